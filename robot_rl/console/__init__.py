"""The operator's web page: cameras, take-over, verdicts, labels, comparisons, weights, and a session's steps. No ROS here."""

"""People at the robot: devices, the arbiter between policy and person, and what a take-over was worth."""

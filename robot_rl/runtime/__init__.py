"""What runs beside the robot: control loop, safety filter, weight channel, promotion gate."""

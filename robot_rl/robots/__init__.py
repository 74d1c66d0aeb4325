"""Robot descriptions (``configs/robots/*.yaml``) and what a command channel makes of an action; nothing here imports ROS."""

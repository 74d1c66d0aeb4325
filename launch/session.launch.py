"""ros2 launch robot_rl session.launch.py --show-args   (the graph is described in robot_rl/ros/graph.py)"""

from robot_rl.ros.launching import to_launch_description


def generate_launch_description():
    return to_launch_description("session")

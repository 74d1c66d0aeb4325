#!/bin/bash
# ROS first, then the workspace; then whatever was asked for.
set -e
source /opt/ros/jazzy/setup.bash
source /opt/robot_rl/install/setup.bash
export PATH="/opt/robot_rl/install/robot_rl/lib/robot_rl:$PATH"
exec "$@"

# The robot's side: ROS 2 Jazzy from apt, robot_rl built by colcon beside it. Ubuntu 24.04, Python 3.12.
#   docker build -f docker/robot.Dockerfile -t robot_rl:robot .
FROM ros:jazzy-ros-base

ENV DEBIAN_FRONTEND=noninteractive MUJOCO_GL=egl
RUN apt-get update && apt-get install -y --no-install-recommends \
      python3-pip python3-venv python3-colcon-common-extensions \
      ros-jazzy-trajectory-msgs ros-jazzy-diagnostic-msgs ros-jazzy-lifecycle-msgs ros-jazzy-rosgraph-msgs ros-jazzy-std-srvs ros-jazzy-launch-ros \
      libegl1 libgl1 libgles2 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

# The image is the environment: packages go where ROS's own Python finds them, in versions that live with its NumPy 1.26
# (so not those of requirements.lock). The stricter way, a virtual environment, is described in docs/packaging.md.
WORKDIR /opt/robot_rl/src/robot_rl
COPY . .
RUN pip install --break-system-packages --no-cache-dir uv \
    && uv pip install --system --break-system-packages --no-cache \
       --constraints docker/ros-constraints.txt --overrides docker/ros-overrides.txt -r pyproject.toml

RUN pip install --break-system-packages --no-cache-dir mcap rosbags

RUN . /opt/ros/jazzy/setup.sh && cd /opt/robot_rl && colcon build --packages-select robot_rl

COPY docker/entrypoint.sh /entrypoint.sh
ENTRYPOINT ["/entrypoint.sh"]
CMD ["robot-rl", "doctor"]

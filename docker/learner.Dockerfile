# The learner's side: a CUDA machine without a robot. Ubuntu 24.04, Python 3.12; torch brings its own CUDA libraries, and ROS comes
# as wheels (x86-64), which `robot-rl up learner` needs. Robots on other machines ship their episodes here.
#   docker build -f docker/learner.Dockerfile -t robot_rl:learner .
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive MUJOCO_GL=egl NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
RUN apt-get update && apt-get install -y --no-install-recommends \
      python3 python3-venv git ca-certificates libegl1 libgl1 libgles2 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/robot_rl
COPY . .
RUN ROBOT_RL_NO_APT=1 UV_NO_CACHE=1 python3 bootstrap setup
RUN .venv/bin/python -m ensurepip && .venv/bin/python -m pip install --no-cache-dir \
      'ros-jazzy-rclpy[fastrtps]' ros-jazzy-std-msgs ros-jazzy-std-srvs ros-jazzy-sensor-msgs ros-jazzy-geometry-msgs \
      ros-jazzy-trajectory-msgs ros-jazzy-diagnostic-msgs ros-jazzy-lifecycle-msgs ros-jazzy-rosgraph-msgs mcap rosbags
ENV PATH=/opt/robot_rl/.venv/bin:$PATH
ENTRYPOINT ["robot-rl"]
CMD ["doctor"]

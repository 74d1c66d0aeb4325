"""The nodes of the ROS 2 graph, one file each; the only room that imports rclpy and message packages.

``executables``, ``names``, ``parameters`` (and :mod:`robot_rl.wire`, :mod:`robot_rl.robots`) import without ROS.
"""

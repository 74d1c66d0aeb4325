"""A graph description as a ROS 2 ``LaunchDescription``. ``launch`` is imported inside functions: wheels do not have it."""

from __future__ import annotations

from typing import Any

from robot_rl.ros.graph import SHIPPER, GraphSpec, NodeSpec, graph


def to_launch_description(name: str) -> Any:
    """What ``launch/<name>.launch.py`` returns: every argument declared, and the nodes of ``GraphSpec.build`` for their values.

    Raises:
        ImportError: the ``launch`` packages are not installed; ``robot-rl up`` starts the same graph without them.
    """
    try:
        from launch.actions import DeclareLaunchArgument, OpaqueFunction

        from launch import LaunchDescription  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError(
            f"launch files need the ROS packages launch and launch_ros; `robot-rl up {name}` needs neither"
        ) from error
    spec = graph(name)
    declared = [
        DeclareLaunchArgument(
            a.name, default_value=a.default, description=f"{a.description} (accepted: {a.accepted})",
            **({"choices": ["true", "false", "1", "0"]} if a.boolean else {"choices": [*a.choices, ""]} if a.choices else {}),
        )
        for a in spec.args
    ]  # fmt: skip
    return LaunchDescription([*declared, OpaqueFunction(function=_nodes, args=[spec])])


def _nodes(context: Any, spec: GraphSpec) -> list[Any]:
    given = {a.name: context.launch_configurations[a.name] for a in spec.args}
    return [_action(node) for node in spec.build(given)]


def _action(node: NodeSpec) -> Any:
    if node.executable == SHIPPER:
        import sys

        from launch.actions import ExecuteProcess

        return ExecuteProcess(
            cmd=[sys.executable, "-m", node.module, *node.arguments], name=node.name, additional_env=dict(node.env),
            respawn=node.respawn, respawn_delay=node.respawn_delay, output="screen",
        )  # fmt: skip
    from launch_ros.actions import Node

    return Node(
        package="robot_rl", executable=node.executable, name=node.name, namespace=node.namespace,
        parameters=[*node.param_files, dict(node.params)], remappings=list(node.remaps), additional_env=dict(node.env),
        respawn=node.respawn, respawn_delay=node.respawn_delay, output="screen", emulate_tty=False,
        ros_arguments=["--log-level", node.log_level], sigterm_timeout="15", sigkill_timeout="10",
    )  # fmt: skip

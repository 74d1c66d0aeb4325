"""What each graph consists of: one description that launch files and ``robot-rl up`` both execute. No rclpy, no launch here.

``GraphSpec.build`` is a pure function of its arguments: the same arguments give the same nodes, whoever starts them.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from robot_rl import paths
from robot_rl.ros.graph_names import ALL_NODES, DEVICES

TF = (("/tf", "tf"), ("/tf_static", "tf_static"))
SHIPPER = "shipper"


class GraphError(ValueError):
    """Arguments that cannot be: each finding names the argument, its value and what is accepted."""


@dataclass(frozen=True)
class ArgSpec:
    """One argument of a graph; ``""`` means "not given". Booleans are ``true``, ``false``, ``1`` or ``0``."""

    name: str
    default: str
    description: str
    choices: tuple[str, ...] = ()
    boolean: bool = False
    required: bool = False

    @property
    def accepted(self) -> str:
        return ", ".join(("true", "false", "1", "0") if self.boolean else self.choices) or "text"


@dataclass(frozen=True)
class NodeSpec:
    """One process of a graph.

    Attributes:
        executable: entry point and module of ``robot_rl.ros``; ``shipper`` is the one process that is no ROS node.
        params: beside and above ``param_files``.
        managed: a lifecycle node that the monitor brings up.
        respawn_delay: seconds before it is started again after it died, where ``respawn``.
        order: starts go up, stops go down.
        arguments: of a process that is no ROS node.
    """

    executable: str
    name: str
    namespace: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    param_files: tuple[str, ...] = ()
    remaps: tuple[tuple[str, str], ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    managed: bool = False
    respawn: bool = False
    respawn_delay: float = 1.0
    order: int = 0
    arguments: tuple[str, ...] = ()
    log_level: str = "info"

    @property
    def module(self) -> str:
        return "robot_rl.runtime.shipping" if self.executable == SHIPPER else f"robot_rl.ros.{self.executable}"

    @property
    def full_name(self) -> str:
        return f"/{self.namespace.strip('/')}/{self.name}".replace("//", "/")


Build = Callable[["Arguments"], list[NodeSpec]]


@dataclass(frozen=True)
class GraphSpec:
    name: str
    summary: str
    args: tuple[ArgSpec, ...]
    builder: Build

    def arguments(self, given: Mapping[str, str]) -> Arguments:
        """Every argument with its value.

        Raises:
            GraphError: unknown names (with the nearest known one) and values that are not accepted, all at once.
        """
        known = {a.name: a for a in self.args}
        wrong = []
        for name, value in given.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                wrong.append(
                    f"{name}:={value}: no such argument of {self.name}; "
                    + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")
                )
                continue
            arg = known[name]
            if arg.boolean and value not in ("true", "false", "1", "0"):
                wrong.append(f"{name}:={value}: accepted are true, false, 1, 0")
            elif arg.choices and value not in arg.choices and value != "":
                wrong.append(f"{name}:={value}: accepted are {', '.join(arg.choices)}")
        values = {a.name: given.get(a.name, a.default) or (a.default if a.boolean or a.choices else "") for a in self.args}
        wrong += [f"{a.name} is empty: {a.description}" for a in self.args if a.required and not values[a.name]]
        if wrong:
            raise GraphError("\n".join(wrong))
        return Arguments(self, values)

    def build(self, given: Mapping[str, str]) -> list[NodeSpec]:
        """The processes, in starting order. Raises GraphError."""
        return sorted(self.builder(self.arguments(given)), key=lambda n: n.order)


@dataclass(frozen=True)
class Arguments:
    graph: GraphSpec
    values: Mapping[str, str]

    def __getitem__(self, name: str) -> str:
        return self.values.get(name, "")

    def true(self, name: str) -> bool:
        return self[name] in ("true", "1")

    def number(self, name: str, kind: type = float) -> Any:
        try:
            return kind(self[name])
        except ValueError:
            raise GraphError(f"{name}:={self[name]}: accepted is {'an integer' if kind is int else 'a number'}") from None

    def names(self, name: str) -> list[str]:
        return [w for w in self[name].replace(",", " ").split() if w]


# ---- arguments

COMMON = (
    ArgSpec("namespace", "", "namespace of the whole graph"),
    ArgSpec("use_sim_time", "false", "take time from /clock", boolean=True),
    ArgSpec("params_file", "", "YAML file with parameters, over those of configs/ros/"),
    ArgSpec("log_level", "info", "of every node", ("debug", "info", "warn", "error", "fatal")),
    ArgSpec(
        "autostart", "true", "configure and activate lifecycle nodes; false leaves every step to ros2 lifecycle", boolean=True
    ),
    ArgSpec("use_respawn", "true", "start nodes again when they die", boolean=True),
    ArgSpec("operator", "joy", "devices of the person, separated by commas; none: nobody"),
    ArgSpec("console", "false", "serve the operator's page", boolean=True),
    ArgSpec("console_bind", "127.0.0.1", "address of the page; beyond loopback it needs console_token_file"),
    ArgSpec("console_port", "8780", "its port; 0: any free one"),
    ArgSpec("console_token_file", "", "file of mode 0600 with the page's token"),
    ArgSpec("fastdds_profile", "auto", "auto: the shipped profile for images; none; or a path"),
    ArgSpec("run_dir", "", "folder of the run: store, weights, checkpoints"),
    ArgSpec("robot", "", "name in configs/robots/ or path of a robot description", required=True),
)
LEARNING = (
    ArgSpec("policy", "", "folder of the base policy, or a run folder", required=True),
    ArgSpec("recipe", "", "configuration of the run; empty: nothing is learned"),
    ArgSpec("head", "", "run folder or recipe whose head acts; empty: the recipe's"),
    ArgSpec("task", "", "instruction"),
    ArgSpec("rewards", "human", "reward sources, separated by commas; none: no reward node"),
    ArgSpec("vlm_rewards", "", "reward sources that ask a model server, separated by commas"),
    ArgSpec("store", "", "episode store; empty: store in run_dir"),
    ArgSpec("device", "auto", "torch device"),
    ArgSpec("gate", "true", "new versions must prove themselves before they act", boolean=True),
    ArgSpec("http_bind", "127.0.0.1", "address of the learner's endpoint"),
    ArgSpec("http_port", "8765", "its port; 0: any free one"),
    ArgSpec("token_file", "", "file of mode 0600 with its bearer token"),
    ArgSpec("learner_url", "", "a learner elsewhere: no learner here, episodes are shipped to it and weights fetched from it"),
)
SIM = (
    ArgSpec("env", "tabletop/Lift", "simulated task"),
    ArgSpec("seed", "0", "of the first reset"),
    ArgSpec("headless", "true", "no window", boolean=True),
    ArgSpec("realtime_factor", "1.0", "simulated seconds a second; 0: as fast as the graph answers"),
    ArgSpec("images", "off", "what simulated cameras publish", ("raw", "jpeg", "both", "off")),
)
GUIDE = (
    ArgSpec(
        "guide",
        "false",
        "walk the operator through a session on the page: checks, baseline, training, comparison",
        boolean=True,
    ),
    ArgSpec("baseline_episodes", "20", "of the old policy before training; 0: none"),
    ArgSpec("training_episodes", "0", "after so many training ends; 0: when the operator says so"),
    ArgSpec(
        "intervention_rate",
        "0.0",
        "training also ends once a person drove less than this share of the last intervention_steps; 0: it does not",
    ),
    ArgSpec("intervention_steps", "1000", "training steps that this share is taken over"),
    ArgSpec("comparison_episodes", "20", "of each policy in the blind comparison; 0: none"),
    ArgSpec("reset_s", "5.0", "countdown between ready and the start of an episode"),
    ArgSpec("hands_off", "false", "nobody has to reset or start anything", boolean=True),
)
EPISODES = (
    ArgSpec("max_episode_s", "10.0", "longest episode"),
    ArgSpec("swap_at", "episode", "when new weights may start to act", ("episode", "chunk")),
)


def _but(args: tuple[ArgSpec, ...], **defaults: str) -> tuple[ArgSpec, ...]:
    """The same arguments with other defaults."""
    return tuple(replace(a, default=defaults[a.name], required=False) if a.name in defaults else a for a in args)


# ---- building


def environment(a: Arguments, *, local: bool) -> dict[str, str]:
    """What every process of a graph gets; what the user has set stays."""
    env = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if local and not os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE"):
        env["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    given = a["fastdds_profile"]
    user_has = any(os.environ.get(n) for n in ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"))
    fast = os.environ.get("RMW_IMPLEMENTATION", "rmw_fastrtps_cpp").startswith("rmw_fastrtps")
    if given != "none" and fast and not (given == "auto" and user_has):
        path = str(paths.find("configs", "ros", "fastdds_shm.xml")) if given == "auto" else given
        env |= {"FASTDDS_DEFAULT_PROFILES_FILE": path, "FASTRTPS_DEFAULT_PROFILES_FILE": path}
    return env


def _settled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without what was not given: an empty text is the node's own default."""
    return {k: v for k, v in given.items() if v not in ("", None)}


class _Robot:
    """The processes around one robot."""

    def __init__(self, a: Arguments, namespace: str, *, sim: bool, local: bool, run_dir: str, store: str = "") -> None:
        self.a, self.namespace, self.sim, self.run_dir = a, namespace.strip("/"), sim, run_dir
        self.store = store or a["store"] or (os.path.join(run_dir, "store") if run_dir else "")
        self.env = environment(a, local=local)
        self.sim_time = a.true("use_sim_time")
        shipped = paths.share() / "configs" / "ros" / f"{a.graph.name}.yaml"
        files = [str(shipped)] if shipped.is_file() else []
        self.files = tuple([*files, *([a["params_file"]] if a["params_file"] else [])])

    def node(
        self, executable: str, order: int, params: Mapping[str, Any], *, name: str = "", delay: float = 1.0, **more: Any
    ) -> NodeSpec:
        lifecycle = ALL_NODES[executable].lifecycle
        common = {"use_sim_time": self.sim_time, "robot_id": self.namespace}
        return NodeSpec(
            executable, name or executable, self.namespace, _settled({**common, **params}), self.files,
            env=self.env, managed=lifecycle, respawn=self.a.true("use_respawn") and executable != "sim_node",
            respawn_delay=delay, order=order, log_level=self.a["log_level"],
            **{"remaps": TF if self.namespace else (), **more},
        )  # fmt: skip

    def guard(self) -> NodeSpec:
        params = {"robot": self.a["robot"], "rearm": "auto" if self.sim else ""}
        if self.run_dir:
            state = f"guard_{self.namespace.replace('/', '_') or 'robot'}.json"
            params["state_file"] = os.path.join(self.run_dir, state)
        return self.node("guard_node", 0, params, delay=0.2)

    def simulation(self, index: int = 0, *, clock: bool = True) -> NodeSpec:
        a = self.a
        params = {
            "env": a["env"], "robot": a["robot"], "seed": (a.number("seed", int) + 10_007 * index) % 900_000,
            "headless": a.true("headless"), "realtime_factor": a.number("realtime_factor"),
            "lockstep": a.number("realtime_factor") == 0.0, "images": a["images"],
            "publish_clock": clock, "use_sim_time": False,
        }  # fmt: skip
        return self.node("sim_node", 1, params)

    def people(self) -> list[NodeSpec]:
        devices = [d for d in self.a.names("operator") if d != "none"]
        if self.console_wanted and "console" not in devices:
            devices.append("console")
        for device in devices:
            if device not in DEVICES:
                raise GraphError(f"operator:={device}: accepted are none, {', '.join(DEVICES)}")
        if not devices:
            return []
        return [self.node("intervention_node", 2, {"robot": self.a["robot"], "devices": devices})]

    @property
    def console_wanted(self) -> bool:
        return self.a.true("console") or self.a.true("guide")

    def console(self) -> list[NodeSpec]:
        a = self.a
        if not self.console_wanted:
            return []
        params: dict[str, Any] = {
            "robot": a["robot"], "store": self.store, "run_dir": self.run_dir, "http_bind": a["console_bind"],
            "http_port": a.number("console_port", int), "token_file": a["console_token_file"],
        }  # fmt: skip
        if self.sim:
            params["reset_service"] = "sim_node/reset"
        if a.true("guide"):
            params |= {"guide": True, "hands_off": a.true("hands_off"), "reset_s": a.number("reset_s")}
            params |= {
                n: a.number(n, int)
                for n in ("baseline_episodes", "training_episodes", "comparison_episodes", "intervention_steps")
            }
            params |= {"intervention_rate": a.number("intervention_rate")}
        return [self.node("console_node", 2, params)]

    def rewards(self) -> list[NodeSpec]:
        out = []
        for executable, arg in (("reward_node", "rewards"), ("vlm_reward_node", "vlm_rewards")):
            sources = [s for s in self.a.names(arg) if s != "none"]
            for source in sources:
                word = "".join(c if c.isalnum() else "_" for c in os.path.splitext(os.path.basename(source))[0])
                name = executable if len(sources) == 1 else f"{executable.removesuffix('_node')}_{word}"
                params = {"source": source, "robot": self.a["robot"], "device": self.a["device"], "run_dir": self.run_dir}
                out.append(self.node(executable, 4, params, name=name))
        return out

    def learner(self, robots: list[str], stores: list[str]) -> NodeSpec:
        a = self.a
        params = {
            "recipe": a["recipe"], "policy": a["policy"], "robots": robots, "stores": stores or None, "device": a["device"],
            "gate": a.true("gate"), "http_bind": a["http_bind"], "http_port": a.number("http_port", int),
            "token_file": a["token_file"], "run_dir": self.run_dir,
        }  # fmt: skip
        return self.node("learner_node", 5, params)

    def policy(self, *, weights: str = "", policy: str = "") -> NodeSpec:
        a = self.a
        remaps = (*(TF if self.namespace else ()), *((("weights", weights),) if weights else ()))
        params: dict[str, Any] = {
            "robot": a["robot"], "policy": policy or a["policy"], "head": a["head"] or a["recipe"], "task": a["task"],
            "device": a["device"], "store": self.store, "run_dir": self.run_dir, "weights_url": a["learner_url"],
            "token_file": a["token_file"],
        }  # fmt: skip
        if "max_episode_s" in a.values:
            params |= {"max_episode_s": a.number("max_episode_s"), "swap_at": a["swap_at"]}
        if policy == "none":
            params |= {"policy": "none", "head": ""}
        if a.true("guide"):  # a guided session starts its episodes itself, whatever the graph's parameter file says
            params["episode_mode"] = "manual"
        elif self.sim:
            params |= {"episode_mode": "auto", "reset_service": "sim_node/reset"}
        if self.sim and "environment" in a.names("rewards"):
            params["end_on_reward"] = ["env"]
        return self.node("policy_node", 6, params, remaps=remaps)

    def shipper(self) -> list[NodeSpec]:
        a = self.a
        if not a["learner_url"]:
            return []
        if not self.store:
            raise GraphError(
                "learner_url is given, and neither store nor run_dir is: accepted is a folder whose episodes are shipped"
            )
        words = [self.store, "--url", a["learner_url"], "--robot", self.namespace.replace("/", ".") or "robot"]
        words += ["--token-file", a["token_file"]] if a["token_file"] else []
        return [
            NodeSpec(
                SHIPPER, SHIPPER, self.namespace, env=self.env, respawn=a.true("use_respawn"), order=5, arguments=tuple(words)
            )
        ]

    def monitor(self, others: list[NodeSpec]) -> NodeSpec:
        managed = [n.name for n in sorted(others, key=lambda n: n.order) if n.managed and n.namespace == self.namespace]
        return self.node(
            "monitor_node", 3, {"managed": managed, "autostart": self.a.true("autostart"), "run_dir": self.run_dir}
        )


def _need_run_dir(a: Arguments) -> str:
    if not a["run_dir"]:
        raise GraphError("run_dir is empty: accepted is the folder of the run (made when it is not there)")
    return os.path.abspath(os.path.expanduser(a["run_dir"]))


def _session(a: Arguments, *, sim: bool) -> list[NodeSpec]:
    robot = _Robot(a, a["namespace"], sim=sim, local=sim, run_dir=_need_run_dir(a))
    nodes = [robot.guard(), *robot.people(), *robot.console(), *robot.rewards(), *robot.shipper(), robot.policy()]
    if sim:
        nodes.append(robot.simulation(clock=robot.sim_time))
    if a["recipe"] and not a["learner_url"]:
        nodes.append(robot.learner([""], [robot.store]))
    return [*nodes, robot.monitor(nodes)]


def _teleop(a: Arguments) -> list[NodeSpec]:
    sim = bool(a["env"])
    robot = _Robot(a, a["namespace"], sim=sim, local=sim, run_dir=_need_run_dir(a))
    nodes = [robot.guard(), *robot.people(), *robot.console(), robot.policy(policy="none")]
    if sim:
        nodes.append(robot.simulation(clock=robot.sim_time))
    return [*nodes, robot.monitor(nodes)]


def _fleet(a: Arguments) -> list[NodeSpec]:
    run_dir = _need_run_dir(a)
    top = a["namespace"].strip("/")
    names = a.names("robots") or [f"robot_{i}" for i in range(a.number("n", int))]
    if len(set(names)) != len(names) or not names:
        raise GraphError(f"robots:={a['robots']}: accepted are one or more different namespaces")
    under = [f"{top}/{n}".strip("/") for n in names]
    nodes: list[NodeSpec] = []
    stores = []
    for i, namespace in enumerate(under):
        home = os.path.join(run_dir, "robots", names[i])
        robot = _Robot(a, namespace, sim=bool(a["env"]), local=bool(a["env"]), run_dir=home, store=os.path.join(home, "store"))
        stores.append(robot.store)
        own = [robot.guard(), *robot.people(), *robot.rewards(), *robot.shipper()]
        own.append(robot.policy(weights=f"/{top}/learner/weights".replace("//", "/")))
        if a["env"]:
            own.append(robot.simulation(i, clock=False))
        nodes += [*own, robot.monitor(own)]
    if a["recipe"] and not a["learner_url"]:
        there = _Robot(a, f"{top}/learner".strip("/"), sim=False, local=bool(a["env"]), run_dir=run_dir)
        learner = there.learner(under, stores)
        nodes += [learner, there.monitor([learner])]
    return nodes


def _learner(a: Arguments) -> list[NodeSpec]:
    if not a["recipe"]:
        raise GraphError("recipe is empty: accepted is a name in configs/ or a path")
    home = _Robot(a, a["namespace"], sim=False, local=False, run_dir=_need_run_dir(a))
    learner = home.learner(a.names("robots") or ["robot"], a.names("stores"))
    return [learner, home.monitor([learner])]


GRAPHS: dict[str, GraphSpec] = {
    g.name: g
    for g in (
        GraphSpec(
            "session",
            "a real robot whose drivers run already",
            (*COMMON, *LEARNING, *EPISODES, *GUIDE),
            lambda a: _session(a, sim=False),
        ),
        GraphSpec(
            "sim_session",
            "a simulated robot and the whole graph",
            _but((*COMMON, *LEARNING, *SIM, *EPISODES, *GUIDE), use_sim_time="true", robot="sim_arm", rewards="environment"),
            lambda a: _session(a, sim=True),
        ),
        GraphSpec(
            "teleop_session",
            "recording by hand: no policy, no learner",
            (
                *COMMON,
                *_but(SIM, env=""),
                ArgSpec("task", "", "instruction"),
                ArgSpec("store", "", "episode store; empty: store in run_dir"),
            ),
            _teleop,
        ),
        GraphSpec(
            "learner",
            "the learner's side where robots share no folder with it",
            (
                *(x for x in COMMON if x.name not in ("robot", "operator") and not x.name.startswith("console")),
                *(
                    x
                    for x in LEARNING
                    if x.name in ("policy", "recipe", "device", "gate", "http_bind", "http_port", "token_file")
                ),
                ArgSpec("robots", "", "robots that ship to it, separated by commas; empty: robot"),
                ArgSpec("stores", "", "more episode stores, separated by commas"),
            ),
            _learner,
        ),
        GraphSpec(
            "fleet",
            "many robots, one learner",
            (
                *_but(
                    (*(x for x in COMMON if not x.name.startswith("console")), *LEARNING, *_but(SIM, env=""), *EPISODES),
                    operator="none",
                    rewards="environment",
                    robot="sim_arm",
                ),
                ArgSpec("robots", "", "namespaces, separated by commas; empty: robot_0 ... robot_<n-1>"),
                ArgSpec("n", "4", "how many robots where none are named"),
            ),
            _fleet,
        ),
    )
}


def graph(name: str) -> GraphSpec:
    """Raises GraphError for a graph that does not exist."""
    if name not in GRAPHS:
        near = difflib.get_close_matches(name, GRAPHS, 1)
        raise GraphError(f"graph {name!r}: accepted are {', '.join(GRAPHS)}" + (f"; did you mean {near[0]}?" if near else ""))
    return GRAPHS[name]

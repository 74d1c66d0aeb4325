"""``lerobot-train`` with every frame of the dataset kept in memory once it was read. The arguments are its own.

LeRobot reads each frame of each batch from files anew, which takes five times as long as training a small network on it. Its training
code is otherwise untouched. It needs ``--num_workers=0``, and frames that are the same every time: no ``dataset.image_transforms``.

    python benchmarks/lerobot_train.py --dataset.repo_id=... --policy.type=diffusion --num_workers=0 ...
"""

from __future__ import annotations

from typing import Any

from lerobot.scripts import lerobot_train


def remembering(make_dataset: Any) -> Any:
    """``make_dataset`` whose datasets hand out a frame that they were asked for before from memory."""

    def made(config: Any) -> Any:
        if config.num_workers != 0 or config.dataset.image_transforms.enable:
            raise SystemExit(
                f"--num_workers={config.num_workers}, --dataset.image_transforms.enable={config.dataset.image_transforms.enable}: "
                "accepted are 0 and false; plain lerobot-train takes others"
            )
        dataset = make_dataset(config)
        plain, kept = type(dataset), dict[int, Any]()

        def frame(self: Any, index: int) -> Any:
            if index not in kept:
                kept[index] = plain.__getitem__(self, index)
            return dict(kept[index])

        dataset.__class__ = type("Remembering", (plain,), {"__getitem__": frame})
        return dataset

    return made


if __name__ == "__main__":
    lerobot_train.make_dataset = remembering(lerobot_train.make_dataset)
    lerobot_train.main()

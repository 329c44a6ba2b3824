"""A reward in another interpreter, for packages that do not get along with ours: `PYTHON reward_worker.py NAME`, with
NAME module:function or imagereward. It needs torch there, and nothing of this project.

On stdin, for each call, a line of JSON {"shape", "prompts", "metadata"} and then the images, float32, as bytes; on
stdout a line of JSON: first {"ready"} or {"error"}, then for each call the rewards, or {"error"}. What the reward
itself prints goes to stderr.
"""

import importlib
import json
import math
import os
import sys
import traceback

import torch


def image_reward(model=None):
    """ImageReward (Xu et al. 2023, arXiv 2304.05977) by its own package."""
    scorer = importlib.import_module("ImageReward").load(model or "ImageReward-v1.0")
    image = importlib.import_module("PIL.Image")

    def reward(images, prompts, metadata):
        pixels = (images.detach().float() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([scorer.score(p, [image.fromarray(a)]) for p, a in zip(prompts, pixels, strict=True)])

    return reward


def load(name):
    """imagereward, or what `module:attribute` names, modules of the current folder included; a class is made."""
    kind, _, model = name.partition("=")
    if kind == "imagereward":
        return image_reward(model or None)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    found = found() if isinstance(found, type) else found
    if not callable(found):
        raise ImportError(f"{name} is no function")
    return found


def main(name):
    """Answer until stdin ends."""
    sys.path.pop(0)  # this file's folder, whose modules are not the reward's
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(what):
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        reward = load(name)
    except Exception:
        say({"error": traceback.format_exc()})
        return
    say({"ready": True})
    while line := sys.stdin.buffer.readline():
        call = json.loads(line)
        data = bytearray(sys.stdin.buffer.read(4 * math.prod(call["shape"])))
        images = torch.frombuffer(data, dtype=torch.float32).reshape(call["shape"])
        try:
            answer = [float(v) for v in reward(images, call["prompts"], call["metadata"])]
        except Exception:
            answer = {"error": traceback.format_exc()}
        say(answer)


if __name__ == "__main__":
    main(sys.argv[1])

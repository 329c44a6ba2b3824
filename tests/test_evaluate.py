"""scale/evaluate.py: fixed seeds, paired differences, and the pipeline's own pictures."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from ctrl import Noise
from ctrl.noise import INITIAL
from ctrl.training.device import make_accelerator
from scale.evaluate import SEED, batches, diversity, draw, evaluate, shared
from scale.prompts import Prompt
from scale.recipes.make_tiny_sd import unet, untrained
from tests.processes import member, several

ROOT = Path(__file__).parents[1]
PROMPTS = [Prompt("a red circle on a white ground", {"weight": 2.0}), Prompt("a blue cross on a black ground")]


def redness(images, prompts, metadata):
    assert len(images) == len(prompts) == len(metadata)
    return images[:, 0].mean((1, 2)) * torch.tensor([m.get("weight", 1.0) for m in metadata])


def blueness(images, prompts, metadata):
    return images[:, 2].mean((1, 2))


@pytest.fixture
def pipeline():
    """The embedded model's parts, untrained."""
    return made()


def made():
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    found = untrained()
    found.set_progress_bar_config(disable=True)
    return found


def tuned(pipeline, by=0.02):
    """The same with another bias at the UNet's end."""
    parts = {**pipeline.components, "unet": unet()}
    parts["unet"].load_state_dict(pipeline.unet.state_dict())
    parts["unet"].conv_out.bias.data += by
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def test_pictures_are_the_pipelines_own_whatever_the_batch(pipeline):
    before = pipeline.scheduler
    drawn = draw(pipeline, PROMPTS, range(5), "ddim", 3, 2.0, batch=2)
    again = draw(pipeline, PROMPTS, [3, 4], "ddim", 3, 2.0, batch=5)
    torch.testing.assert_close(drawn.images[3:], again.images, rtol=0, atol=1e-5)
    assert pipeline.scheduler is before
    start = Noise(SEED).normal(torch.tensor([3]), (4, 8, 8), INITIAL).float()
    from scale.samplers import sampler

    pipeline.scheduler = sampler("ddim", pipeline).scheduler
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "latents": start, "output_type": "pt"}
    torch.testing.assert_close(again.images[:1], pipeline([PROMPTS[1].text], **options).images, rtol=0, atol=1e-5)


def test_rewards_see_their_own_metadata_in_any_chunk(pipeline):
    drawn = draw(pipeline, PROMPTS, range(4), "ddim", 2, 1.0)
    expected = drawn.images[:, 0].mean((1, 2)) * torch.tensor([2.0, 1.0, 2.0, 1.0])
    for chunk in (1, 3, 8):
        torch.testing.assert_close(drawn.rewarded(redness, chunk), expected)


def test_diversity_is_within_a_prompt():
    """Two prompts, pictures at distances 1 and 3 a coordinate."""
    latents = torch.tensor([0.0, 10.0, 1.0, 13.0])[:, None, None, None].expand(4, 4, 8, 8)
    two = [Prompt("a"), Prompt("b"), Prompt("a"), Prompt("b")]
    assert diversity(latents, two) == pytest.approx(2.0)
    assert diversity(latents[:2], two[:2]) is None


def both(pipeline):
    """An evaluation of several batches, the last of them smaller."""
    return evaluate(
        tuned(pipeline), pipeline, PROMPTS, {"red": redness, "blue": blueness}, samples=5, guidance=2.0,
        grid=[("euler", 2)], grid_samples=3, headline=("ddim", 3), kl_steps=2, batch=2,
    )  # fmt: skip


def worker(folder, rank, world):
    """One process of several."""
    with member(folder, rank, world):
        make_accelerator()
        drawn = []
        pieces = shared(batches(7, 2), lambda ids: drawn.append(ids) or list(ids))
        assert pieces == [[0, 1], [2, 3], [4, 5], [6]] and drawn == batches(7, 2)[rank::world]
        both(made()).write(Path(folder, f"{rank}.json"))


@pytest.mark.long
def test_several_processes_share_an_evaluation_and_find_what_one_finds(tmp_path, pipeline):
    """Each draws its share, of the same batches, and all have the same numbers, to the last bit."""
    with several(2, __file__, tmp_path):
        both(pipeline).write(tmp_path / "one.json")
    one, *found = ((tmp_path / f"{name}.json").read_text() for name in ("one", 0, 1))
    assert found == [one, one]


def test_a_model_gains_nothing_on_itself(pipeline, tmp_path):
    rewards = {"red": redness, "blue": blueness}
    found = evaluate(
        pipeline,
        pipeline,
        PROMPTS,
        rewards,
        samples=4,
        guidance=2.0,
        grid=[("euler", 2)],
        headline=("ddim", 3),
        kl_steps=4,
    )
    assert (found.gain, found.gain_se, found.path_kl) == (0.0, 0.0, 0.0)
    assert found.diversity_before == found.diversity_after > 0
    (row,) = found.grid
    assert (row["sampler"], row["steps"], row["blue_gain"]) == ("euler", 2, 0.0)
    found.write(tmp_path / "evaluation.json")
    assert json.loads((tmp_path / "evaluation.json").read_text())["reward_after"] == found.reward_after


def test_a_gain_is_paired_and_kl_is_of_guided_processes(pipeline):
    """A bias b of eps, the same for both prompts, shifts the guided eps by b at any guidance; its rate of KL is
    ½ |b|² g²/sigma² in time, so the KL is ½ 256 b² (lambda(end) - lambda(start)), and its trapezoid, on steps of
    h = 0.87 in lambda, at most h²/12 off."""
    by, other = 0.02, tuned(pipeline)
    found = evaluate(other, pipeline, PROMPTS, {"red": redness}, samples=6, guidance=2.0, grid=[("ddim", 3)],
                     headline=("ddim", 3), kl_steps=16)  # fmt: skip
    sides = [draw(p, PROMPTS, range(6), "ddim", 3, 2.0).rewarded(redness, 6).double() for p in (pipeline, other)]
    difference = sides[1] - sides[0]
    assert found.gain == pytest.approx(float(difference.mean()), rel=1e-5)
    assert found.gain_se == pytest.approx(float(difference.std()) / 6**0.5, rel=1e-4)
    kept = pipeline.scheduler.alphas_cumprod.double()
    span = float((kept[0] / (1 - kept[0])).log() - (kept[-1] / (1 - kept[-1])).log())
    assert found.path_kl == pytest.approx(0.5 * 256 * by**2 * span, rel=0.065)
    assert found.path_kl_se < 1e-3 * found.path_kl


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

"""A training loop in one process that goes on where it stopped, whatever stopped it.

    python examples/plain_loop.py --repo ckpts --steps 40
    python examples/plain_loop.py --repo ckpts --steps 80

The first run saves steps 20 and 40, the second one resumes at 40 and ends at 80. What makes a run
go on exactly is one dict: the model, the optimizer, the schedule, the random state and the step.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import dcpstore

SAVE_EVERY = 20  # steps


class RandomState:
    """Torch's random state, so that dropout and shuffling go on as they would have."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state to save."""
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take a state that was saved."""
        torch.set_rng_state(state["torch"])


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points (size, 2), and whether each lies in a ring (size, 1)."""
    points = torch.randn(size, 2)
    radius = points.norm(dim=1, keepdim=True)
    return points, ((radius > 0.7) & (radius < 1.5)).float()


def main() -> None:
    """Train up to `--steps`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repo", required=True, help="a folder or a database URL")
    parser.add_argument("--steps", type=int, default=40, help="train up to this step")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=40, gamma=0.5)
    state = {
        "model": model,
        "optim": optimizer,
        "schedule": schedule,
        "rng": RandomState(),
        "step": 0,
    }

    with dcpstore.open(args.repo) as repo:
        if repo.log(limit=1):  # there is something to resume from
            report = dcpstore.load(state, repo)
            print(f"resumed from {report.version}, step {state['step']}")
        else:
            print("nothing to resume from: a new run")

        for step in range(state["step"] + 1, args.steps + 1):
            points, inside = batch(128)
            loss = nn.functional.binary_cross_entropy_with_logits(model(points), inside)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % SAVE_EVERY == 0 or step == args.steps:
                state["step"] = step
                version = dcpstore.save(
                    state,
                    repo,
                    step=step,
                    metrics={"loss": loss.item()},
                    retention=dcpstore.Retention(keep_last=3, keep_best=("loss", 1)),
                )
                print(f"step {step}: loss {loss.item():.4f}, saved {version}")
        print(f"best so far: step {repo.best('loss').step}")


if __name__ == "__main__":
    main()

"""Fine-tune a model on a CSV file with the columns path, caption and split, and print R@1 before and after.

python examples/finetune_csv.py MODEL pairs.csv --run runs/finetuned
"""

import argparse

from bclip_fast.eval import evaluate
from bclip_fast.train.engine import EngineConfig
from bclip_fast.train.finetune import FinetuneConfig, finetune
from bclip_fast.train.schedule import OptimConfig

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("csv")
parser.add_argument("--run", default="runs/finetuned")
parser.add_argument("--lr", type=float, default=1e-5)
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()


def recall(model: str) -> dict[str, float]:
    """Return R@1 of both directions on the split val."""
    results = evaluate(model, ["retrieval"], data=args.csv, split="val", duplicates="captions", progress=False)
    figures = results["tasks"]["retrieval"]["figures"]
    return {figure["name"]: figure["value"] for figure in figures if figure["name"].endswith("R@1")}


before = recall(args.model)
settings = FinetuneConfig(
    model=args.model,
    data=args.csv,
    run=args.run,
    epochs=args.epochs,
    batch_size=8,
    optim=OptimConfig(lr=args.lr, warmup_steps=2, decay="linear"),
    engine=EngineConfig(name="ddp"),
)
run = finetune(settings)
for name, value in recall(str(run)).items():
    print(f"{name}: {before[name]:.0%} -> {value:.0%}")

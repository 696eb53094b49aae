"""Run a recipe: `accelerate launch recipes/train.py --config recipes/<task>/<name>.yaml [--key value ...]`."""

import sys

from hf_transfer.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

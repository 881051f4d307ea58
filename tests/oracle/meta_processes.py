"""One of several processes of Meta's code, run by test_meta.py: `python meta_processes.py FOLDER ARGUMENTS COUNT RANK`
computes the logits of FOLDER's tokens.npy with the shard of its rank; rank 0 writes logits.npy."""

import json
import sys
from pathlib import Path

import fairscale.nn.model_parallel.initialize as parallel
import numpy as np
import torch
import torch.distributed as dist
from llama_models.llama3.args import ModelArgs
from llama_models.llama3.model import Transformer

folder, count, rank = Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), count), rank=rank, world_size=count)
parallel.initialize_model_parallel(count)
model = Transformer(ModelArgs(**json.loads(sys.argv[2]))).eval()
model.load_state_dict(torch.load(folder / f"consolidated.{rank:02}.pth", weights_only=True), strict=True)
logits = model(torch.from_numpy(np.load(folder / "tokens.npy")).long(), 0)
if rank == 0:
    np.save(folder / "logits.npy", logits.numpy())
dist.barrier()

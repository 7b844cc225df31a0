"""Prototype: sampled softmax. Columns: frequent F, tail targets of the micro-batch, uniform sample of the other tail."""
import sys, time, json, math, argparse, dataclasses
import numpy as np, torch, torch.nn.functional as F
from torch import Tensor
from engine import optim
from engine.config import TrainConfig, OptimConfig
from engine.config.presets import PRESETS
from engine.tokens.batches import Batches, derived_seed, windows_at
from engine.tokens.shards import TokenStream
from engine.optim import learning_rate
from model.gpt2 import GPT2
from model.presets import GPT2Config

class Sampler:
    def __init__(self, order, V, num_frequent, k):
        self.V, self.F, self.k = V, num_frequent, k
        self.frequent = order[:num_frequent].sort().values
        self.is_frequent = torch.zeros(V, dtype=torch.bool); self.is_frequent[self.frequent] = True

    def draw(self, targets):
        """(ids (n,) , log weights (n,), labels)"""
        kept = self.is_frequent.clone(); kept[targets] = True
        ids = kept.nonzero().squeeze(1)                  # certain
        rest = self.V - len(ids)
        # k of the rest without replacement: rejection from uniform draws
        drawn = torch.randint(self.V, (int((self.k + 64) * self.V / rest * 1.1),))
        drawn = drawn[~kept[drawn]]
        # distinct, in order of the draw: exactly k
        uniq, inverse = drawn.unique(return_inverse=True)
        first = torch.full((len(uniq),), len(drawn)).scatter_reduce(0, inverse, torch.arange(len(drawn)), "amin")
        picked = uniq[first.argsort()[: self.k]]
        assert len(picked) == self.k
        chosen = torch.cat([ids, picked])
        logw = torch.zeros(len(chosen)); logw[len(ids):] = math.log(rest / self.k)
        place = torch.empty(self.V, dtype=torch.int64); place[chosen] = torch.arange(len(chosen))
        return chosen, logw, place[targets]

class Fn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, chosen, logw, labels):
        W = weight.index_select(0, chosen)
        N = len(h)
        rows = max(1, 1_600_000 // len(chosen))
        dh = torch.empty_like(h); dW = torch.zeros_like(W); total = 0.0
        for a in range(0, N, rows):
            hh, ll = h[a:a+rows], labels[a:a+rows, None]
            z = torch.addmm(logw, hh, W.T)
            m = z.amax(1, keepdim=True); t = z.gather(1, ll)
            s = z.sub_(m).exp_().sum(1, keepdim=True)
            total = total + (s.log() + m - t).sum()
            dz = z.mul_(1 / s).scatter_add_(1, ll, torch.full(ll.shape, -1.0))
            torch.mm(dz, W, out=dh[a:a+rows]); dW.addmm_(dz.T, hh)
        ctx.save_for_backward(dh, dW, chosen); ctx.shape = weight.shape; ctx.N = N
        return total / N
    @staticmethod
    def backward(ctx, g):
        dh, dW, chosen = ctx.saved_tensors
        dense = torch.zeros(ctx.shape).index_copy_(0, chosen, dW.mul_(g / ctx.N))
        return dh.mul_(g / ctx.N), dense, None, None, None

def config(a, steps):
    base = PRESETS["small"]
    return dataclasses.replace(base, num_steps=steps, tokens_per_step=a.tokens, data="/tmp/sampled/data",
        model=GPT2Config(a.L, a.H, a.C, a.T, init="zero_residual"),
        optim=dataclasses.replace(base.optim, lr=a.lr, muon_lr=a.muon_lr, warmup_tokens=(steps // 20) * a.tokens))

class Arm:
    def __init__(self, a, cfg, seed, sampler):
        torch.manual_seed(seed)
        self.a, self.cfg, self.seed, self.sampler = a, cfg, seed, sampler
        self.model = GPT2(cfg.model); self.opt = optim.build(self.model, cfg.optim); self.norms = []
    def step(self, index, tokens, targets):
        m = self.model; m.train()
        torch.manual_seed(derived_seed(self.seed, index, 0))
        if self.sampler is None:
            loss = m(tokens, targets)
        else:
            h = m.hidden(tokens).flatten(0, 1)
            chosen, logw, labels = self.sampler.draw(targets.flatten())
            loss = Fn.apply(h, m.wte.weight, chosen, logw, labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(m.parameters(), self.cfg.optim.clip, foreach=True)
        optim.set_learning_rate(self.opt, learning_rate(index, self.cfg))
        self.opt.step(); self.opt.zero_grad()
        self.norms.append(float(norm))
        return float(loss.detach())

def val(model, a, most=None):
    stream = TokenStream.open("/tmp/sampled/data", "val", vocab_size=50257)
    n = min(len(stream) // a.T, (most or a.val) // a.T); step = (len(stream) - 1) // a.T / n
    rows = stream.window_rows(np.array([int(i * step) for i in range(n)]), a.T).astype(np.int64)
    rows = torch.from_numpy(rows); tot = 0.0
    model.eval()
    with torch.no_grad():
        for b in rows.split(max(1, 2048 // a.T)):
            tot += float(model(b[:, :-1], b[:, 1:])) * len(b)
    return tot / n

def parser():
    p = argparse.ArgumentParser()
    for name, d in dict(L=4, H=4, C=96, T=128, tokens=2048, seed=1, steps=150, F=0, k=1024, val=65536, out="/tmp/sampled/results.jsonl", lr=2e-3, muon_lr=0.02).items():
        p.add_argument("--" + name, type=type(d), default=d)
    return p

if __name__ == "__main__":
    torch.set_num_threads(1)
    a = parser().parse_args()
    cfg = config(a, a.steps)
    order = torch.from_numpy(np.load("/tmp/sampled/order.npy"))
    sampler = Sampler(order, 50257, a.F, a.k) if a.F else None
    arm = Arm(a, cfg, a.seed, sampler)
    stream = TokenStream.open("/tmp/sampled/data", "train", vocab_size=50257)
    batches = Batches(stream, context=a.T, tokens_per_step=a.tokens, micro_batch_size=a.tokens // a.T, seed=a.seed)
    times, losses = [], []
    began = time.process_time()
    for i in range(a.steps):
        (x, y), = batches.at(i)
        t = time.process_time(); losses.append(arm.step(i, x, y)); times.append(time.process_time() - t)
    train = time.process_time() - began
    v = val(arm.model, a)
    row = dict(vars(a), val_loss=v, step_s=float(np.median(times)), train_s=train, last=float(np.mean(losses[-10:])), norm=float(np.median(arm.norms)), 
        norm_mean=float(np.mean(np.minimum(1, 1/np.array(arm.norms)))))
    open(a.out, "a").write(json.dumps(row) + "\n"); print(row, flush=True)
    batches.close()

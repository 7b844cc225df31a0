"""Muon's step on GPT-2 124M against fused AdamW's, and the accuracy of its bfloat16 products."""
import json, os, statistics, torch
from engine import optim
from engine.config import OptimConfig
from engine.optim.muon import JORDAN, POLAR_EXPRESS, orthogonalize
from model.gpt2 import GPT2
from model.presets import PRESETS
out = open(os.environ["OUT"] + "/muon.jsonl", "w")
def say(**row): print(json.dumps(row)); print(json.dumps(row), file=out, flush=True)
torch.manual_seed(0)
for name, flags in (("adamw", {}), ("muon", {"name": "muon"}), ("muon rows", {"name": "muon", "muon_rows": True})):
    model = GPT2(PRESETS["gpt2"]).cuda()
    o = optim.build(model, OptimConfig(**flags))
    grads = [torch.randn_like(p) * 1e-3 for p in model.parameters()]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for found in (None, torch.zeros((), device="cuda")):
        if found is not None: o.found_inf = found
        times, peak = [], 0
        for i in range(14):
            for p, g in zip(model.parameters(), grads): p.grad = g.clone()
            torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); base = torch.cuda.memory_allocated()
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record(); o.step(); b.record(); torch.cuda.synchronize()
            times.append(a.elapsed_time(b)); peak = torch.cuda.max_memory_allocated() - base
        times = sorted(times[4:])
        say(optimizer=name, guarded=found is not None, ms=round(statistics.median(times), 3), low=round(times[0], 3), high=round(times[-1], 3), extra_mb=round(peak / 1e6, 1), finite=all(bool(torch.isfinite(p).all()) for p in model.parameters()))
    if name != "adamw":
        o.found_inf = torch.ones((), device="cuda")
        was = [p.detach().clone() for p in model.parameters()]
        for p, g in zip(model.parameters(), grads): p.grad = g.clone()
        o.step()
        say(optimizer=name, skipped_keeps_bits=all(torch.equal(p, w) for p, w in zip(model.parameters(), was)))
    del model, o, grads, before
for shape in ((3, 768, 768), (1, 3072, 768), (1, 768, 3072)):
    m = torch.randn(shape, device="cuda") * torch.logspace(0, -3, shape[2], device="cuda")
    for name, c in (("jordan", JORDAN), ("polar", POLAR_EXPRESS)):
        got = orthogonalize(m, c); again = orthogonalize(m, c)
        want = orthogonalize(m.double().cpu(), c).cuda()
        v = torch.linalg.svdvals(got.double()); w = torch.linalg.svdvals(want)
        say(shape=shape, coefficients=name, error=float((got - want).norm() / want.norm()), values=[float(v.min()), float(v.max())], exact=[float(w.min()), float(w.max())], same_bits=torch.equal(got, again), dtype=str(got.dtype))

"""The training loss that --head sampled reports, less the full one: same weights, same batches, means over samples."""
from proto import *
import functools
from kernels.sampled import sampled_cross_entropy
a = parser().parse_args(); torch.set_num_threads(1)
cfg = config(a, a.steps); order = torch.from_numpy(np.load("/tmp/sampled/order.npy"))
arm = Arm(a, cfg, a.seed, Sampler(order, 50257, 2048, 1024))
stream = TokenStream.open("/tmp/sampled/data", "train", vocab_size=50257)
batches = Batches(stream, context=a.T, tokens_per_step=a.tokens, micro_batch_size=a.tokens // a.T, seed=a.seed)
marks = [int(x) for x in (0, a.steps // 4, a.steps)]
def show(i):
    m = arm.model.eval(); rows = []
    with torch.no_grad():
        for j in range(6):
            (x, y), = batches.at(a.steps + j)
            h, w, t = m.hidden(x).flatten(0, 1), m.wte.weight, y.flatten()
            full = float(m(x, y)); torch.manual_seed(j)
            s = [float(sampled_cross_entropy(h, w, t, vocab_size=50257, frequent=order[:2048], size=1024)) for _ in range(10)]
            rows.append((full, np.mean(s) - full, np.std(s)))
    r = np.array(rows); print(f"step {i}: full {r[:,0].mean():.3f}, sampled less full {r[:,1].mean():+.4f} (batches {r[:,1].min():+.4f} to {r[:,1].max():+.4f}), one sample's std {r[:,2].mean():.4f}", flush=True)
for i in range(a.steps + 1):
    if i in marks: show(i)
    if i < a.steps:
        (x, y), = batches.at(i); arm.step(i, x, y)
batches.close()

"""Seconds of a step, both arms interleaved, CPU time of one thread."""
from proto import *
if __name__ == "__main__":
    p = parser(); p.add_argument("--rounds", type=int, default=6); p.add_argument("--arms", default="0:0,2048:1024,4096:1024,4096:2048")
    a = p.parse_args(); torch.set_num_threads(1)
    cfg = config(a, 1000); order = torch.from_numpy(np.load("/tmp/sampled/order.npy"))
    stream = TokenStream.open("/tmp/sampled/data", "train", vocab_size=50257)
    batches = Batches(stream, context=a.T, tokens_per_step=a.tokens, micro_batch_size=a.tokens // a.T, seed=a.seed)
    arms = {}
    for name in a.arms.split(","):
        f, k = map(int, name.split(":")); arms[name] = Arm(a, cfg, 1, Sampler(order, 50257, f, k) if f else None)
    cpu = {n: [] for n in arms}
    for i in range(a.rounds + 1):
        (x, y), = batches.at(i)
        for n, arm in arms.items():
            t = time.process_time(); arm.step(i, x, y)
            if i: cpu[n].append(time.process_time() - t)
    base = np.array(cpu[next(iter(arms))])
    for n, c in cpu.items():
        r = np.array(c) / base
        print(f"L={a.L} C={a.C} T={a.T} tokens={a.tokens} {n}: {np.median(c):.3f} s, ratio {np.median(r):.3f} ({r.min():.3f} to {r.max():.3f})", flush=True)
    batches.close()

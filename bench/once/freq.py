import numpy as np
from engine.tokens.mixture import *
import engine.tokens.mixture as m, inspect
from engine.tokens.shards import TokenStream
s=TokenStream.open("/tmp/sampled/data","train",vocab_size=50257)
v=TokenStream.open("/tmp/sampled/data","val",vocab_size=50257)
import glob
def raw(split): 
    return np.concatenate([np.fromfile(f,dtype=np.uint16)[512:] for f in sorted(glob.glob(f"/tmp/sampled/data/*_{split}_*.bin"))])
t,w=raw("train"),raw("val")
print(len(s),len(t),len(v),len(w))
c=np.bincount(t,minlength=50257); cv=np.bincount(w,minlength=50257)
order=np.argsort(-c,kind="stable")
print("distinct train",(c>0).sum(),"val",(cv>0).sum())
for F in (1024,2048,4096,8192,16384):
    print(F,"coverage of train by frequency order %.4f val %.4f; by id order %.4f %.4f"%(c[order[:F]].sum()/c.sum(),cv[order[:F]].sum()/cv.sum(),c[:F].sum()/c.sum(),cv[:F].sum()/cv.sum()))
    # tail targets unique per 2048 batch
r=np.random.default_rng(0)
for F in (2048,4096):
    tail=np.ones(50257,bool); tail[order[:F]]=False
    us=[]
    for _ in range(50):
        b=np.concatenate([t[i:i+256] for i in r.integers(0,len(t)-256,8)])
        us.append(len(np.unique(b[tail[b]])))
    tid=np.ones(50257,bool); tid[:F]=False
    ui=[len(np.unique(b[tid[b]])) for b in [np.concatenate([t[i:i+256] for i in r.integers(0,len(t)-256,8)]) for _ in range(50)]]
    print(F,"unique tail targets of 2048: freq",np.mean(us),"ids",np.mean(ui))
np.save("/tmp/sampled/order.npy",order); np.save("/tmp/sampled/counts.npy",c)
from scipy.stats import spearmanr

from training_runs import *
def test_it(trainers, tmp_path):
    import time
    for r in ("tiny_mdlm", "tiny_ccdd"):
        t=time.time()
        trainers.train(r, "a"+r, training__steps=100, checkpoint__every=3, recorded=True); print(time.time()-t)
        t=time.time()
        trainers.train(r, "a"+r, training__steps=100, checkpoint__every=3, recorded=True); print(time.time()-t)
        t=time.time()
        p=trainers.train(r, "b"+r, training__steps=100, checkpoint__every=0); print(time.time()-t)
        assert_same_run(tmp_path/("a"+r), tmp_path/("b"+r))
        print(p.out)

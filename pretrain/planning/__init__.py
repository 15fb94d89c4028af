"""`braid plan`: estimates of what a recipe needs, before it is given a GPU. Every formula, and where it is from.

Symbols: P parameters a process works with, d ranks with the same weights (data x context), t tensor, c context,
p pipeline, v virtual pieces, m micro-batches of a step, n positions of a micro-batch on a process (rows x length / c),
W width, F width of the MLP, V vocabulary, b bytes of a number in products (bf16 2, fp32 4), k processes of a group.

    figure               formula                                                         source
    -------------------  --------------------------------------------------------------  -------------------------------
    parameters           of the network built on the meta device, with the layers        parallel/layers.py
                         divided that it says can be (rows of the vocabulary padded)
    weights, gradients,  plain: 4 P + 4 P + 4 P per moment, and 2 bytes for each         autocast of torch
    optimizer state        element of a matrix in bf16 (its copies)
                         megatron, bf16: 2 P of matrices, 4 P of all else, 4 P, and      Megatron-LM, distributed
                         (4 of matrices + 4 per moment) P / d; fp32: without the 4       optimizer: 6 + 12 / d
                         deepspeed 1: as plain, and (4 + 4 per moment) P / d instead;    ZeRO, arXiv 1910.02054, 5;
                         2: gradients / d; 3: weights / d                                measured (test_memory.py)
    average (EMA)        4 P, divided as the optimizer state                             training/ema.py
    activations          each tensor that autograd keeps, once: for a block in bf16      counted (activations.py);
                         n (14 W + 4 F + 4 heads) / t inside divided layers and n (24    the paper's count is
                         W + 16) elsewhere, there / t with sequence parallelism only     arXiv 2205.05198, 4
      recomputed         4 n W for each block, and one block in full                     arXiv 2205.05198, 5
      in flight          1F1B, stage i: min(p - i, m) micro-batches; interleaved         arXiv 2104.04473, 2.2;
                         (2 (p - 1 - i) + (v - 1) p + 1) / v                             2205.05198, 4.2.3
      heads              n (4 W + (6 W + 8) for each head), / t with sequence            counted (activations.py)
                         parallelism: the last state, norms and inputs of heads
    head and loss        16 n V / t: logits, log-probabilities and two gradients in      measured (memory.py)
                         float32; more for losses that look at all tokens
    optimizer's step     4 bytes for each element of state held (the root in AdamW)      torch, foreach AdamW
    while it is built    4 P; deepspeed 3: 4 P / d and the largest module whole          network.py, `materialise`
    tensor               a block's sums: 2 of n W (its attention and MLP) forward and    arXiv 1909.08053, 3;
                         backward, each a ring all-reduce: 2 (k - 1) / k of the bytes
      sequence-parallel  gather and scatter instead, and one gather more for the         arXiv 2205.05198, 4.2.2
                         gradient of the weights; recomputation sums again
    context, ulysses     all-to-all of q, k, v and the output, n W / t each              arXiv 2309.14509, 3.2
             gather      k and v to all others, and their gradients back
    pipeline             4 n W for each piece's state and its gradient                   arXiv 2104.04473, 4.1
    data                 plain: all-reduce of the gradients; megatron, ZeRO 1: scatter,  arXiv 1910.02054, 7
                         and gather of the weights; ZeRO 2 and 3 scatter the gradients
                         of every micro-batch, 3 gathers the weights twice for each, in
                         bf16 what products take in bf16
    Muon                 (t - 1) of a process's matrices in float32, where an engine     training/muon.py
                         divides the state / d; ZeRO 3: and there and back on d, 2
                         (d - 1) / d^2 of them
    bubble               (p - 1) / (v m + p - 1) of the time                             arXiv 2104.04473, 2.2
      uneven stages      m max + (sum - max) / v: the slowest stage sets the pace        schedule.py
    seconds sent         bytes / (0.8 x speed of the link, one direction); a ring over   hardware.py (data sheets)
                         nodes uses the network cards of all its members in a node,
                         where they are fewest
    hidden               gradients and weights of megatron, gradients of ZeRO 2 and 3,   assumed
                         weights of 3, with overlap, behind one micro-batch (ZeRO: all);
                         interleaved sends
    FLOPs                of the network, and of a pass without gradient a third;         model/flops.py
                         recomputation adds a third of the blocks'
    seconds of products  FLOPs / (efficiency x dense bf16 peak), efficiency assumed      hardware.py
    disk                 4 bytes for each weight, moment and average                     checkpoint/snapshot.py

Left out: vectors per sequence (adaLN), sums at the embedding and the head, the optimizer's arithmetic, data, logging,
validation and checkpoints, and a frozen encoder that is not here. Where a GPU or a link is not known, there is n/a.
"""

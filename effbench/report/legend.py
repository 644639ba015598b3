"""How to read the leaderboard: what stands above its tables, and below them."""

INTRODUCTION = """\
# effbench leaderboard

Written by `effbench leaderboard` from the records in [records](records); do not edit. The same as a web page with
plots: [index.html](index.html); as data: [leaderboard.csv](leaderboard.csv), [leaderboard.json](leaderboard.json).

Each section is one *envelope*: the same task, data, weights, protocol and device. Only its rows are ranked together.
Test speed-up is baseline time / arm time, lossy-ness 1 - quality / baseline's quality, both with 95 % intervals; ★
marks the Pareto front of the two, with the share of draws in which a method is on it. How to read all else stands at
the end.
"""

LEGEND = """\
<details><summary>How to read it</summary>

- Where rows come from several runs, "run" says from which, and its command repeats it: compare ratios across runs,
  never seconds. Of equal arms the newest measurement that did not fail is shown.
- Order: the baseline, then the methods by test speed-up, those below the line last, then the controls.
- ★, the Pareto front: baseline and methods that no other of them beats on both test speed-up and lossy-ness of the
  primary metric. The percentage is the share of 2000 draws in which an arm is there, each figure drawn on its own from
  a normal distribution as wide as its 95 % interval (speed-ups on the logarithm). Arms of one run share the baseline's
  noise, which the draws do not know. — where an interval is missing, a method failed, or quality means nothing;
  controls are not placed. "Worth using" names those that are shown to be FASTER, on the front, above the line, and lose
  less than 20 % of the baseline's quality.
- Below the line: methods that were compared with `random` or `resize` at the same budget and not shown to beat it
  (worse, or no difference shown: each says which). Methods that take nothing away have no such control and stay above.
- Controls: `noop` is a second, untouched baseline, `identity` the baseline on effbench's own attention. `random`,
  `grid` and `norm` keep as many tokens as a method, chosen blindly. `resize` spends the FLOPs of a method's
  image tower on a smaller image; its quality is interpolated between two sizes. A stack's part alone is one method of
  it.
- Speed-up: median of the paired ratios baseline time / arm time, with its 95 % interval. FASTER and SLOWER need a
  99 % interval that excludes 1 and a median beyond 3 %; NO DIFFERENCE an interval within 3 %; AMBIGUOUS is an answer. A
  speed-up inside the band of `noop`, a second untouched baseline, is noise.
- FLOPs promise: FLOPs of the baseline / FLOPs of the arm, its own scoring and matching included. Realised: measured
  speed-up / promise.
- Amdahl ceiling: the speed-up if the towers that the arm changes took no time.
- GFLOPs: per image-caption pair at test time, 1 MAC = 2 FLOPs; `+` is the method's own scoring, `≥` a lower bound.
  Useful: what masks leave of them. Low-bit: bit operations, not within GFLOPs. Analytic: the same by the layers'
  formulas; `≠` where it is off by more than 1 %. Of single images: where token counts depend on the image, mean and
  [5 %, 95 %] of images at batch 1; in a batch all are padded to the longest.
- Time of a step: mean of the middle half of the timed steps; compute alone but for data wait and transfer. Memory:
  growth of the process above what its libraries take, and the tensors in it.
- Writing: every arm writes as many tokens, whatever they are. First token: image tower, connector, prefill (the decoder
  reads image and question) and choosing it, up to where the second one begins; further tokens: a pass of the decoder
  each, and choosing them. A step is the time to the first token and that of each further one. Per second: of all texts
  together. A beam search's tokens are those of the texts that it ends with, not of all its beams. KV cache: keys and
  values of all texts when the last token is written. GFLOPs are of one text, with the pairs that a causal mask hides.
  Small products wait for memory and for calls more than for arithmetic: removing layers may realise over 100 %.
- Captions: cider (CIDEr-D), bleu4, rouge_l, meteor and spice by pycocoevalcap's definitions, times 100; document
  frequencies are those of the whole split's references. meteor and spice stand only where Java was there, and not for
  drawn data; rows with and without them are ranked together.
- Agrees in t2i_top1: share of the captions for which the arm ranks the same image first as the baseline;
  t2i_overlap10: share of the ten best that both have in common; i2t: of images and their captions. Image cosine, text
  cosine: of the arm's embeddings with the baseline's, mean over images and captions; only of arms that use the
  baseline's own weights.
- Disk: the model's state dict as it is saved. Quantised: share of the weights of linear layers and convolutions.
- Tokens: those that enter the first and the last block's MLP. Peak: all tensors that live together in a test step, in a
  process of its own; the process's own growth stands beside it under Memory.
- Train: — where an arm uses the baseline's own weights, "as" another where it has those that the other trained.
  Where the image tower is locked its features are computed once;
  that pass is part of the training time, and its FLOPs are spread over the epochs. Choosing layers: what a method
  decides by a look at training data before it trains; part of the training time, and of "head".
- What training costs, means over the seeds. Target: 95 % of the baseline's best value of the primary metric on dev
  (divided by 0.95 where lower is better). Seconds to target: the arm's own work up to the first look at dev that comes
  to it: choosing layers, the whole feature pass, training steps, no data wait; as exact as the looks are dense
  (`--dev-checks`). Speed-up to target: the baseline's seconds / the arm's, without an interval. FLOPs are those of
  training steps, forward and backward, and of the feature pass: what is computed to choose layers is not counted.
  Tuning: the whole training. Saved per query: what a timed test step takes less than the baseline's, per image-caption
  pair. Break-even: tuning seconds / seconds saved per query, where the test speed-up is FASTER; it is of time alone,
  whatever the quality.
- Advantage: method - control in the metric's unit, positive is better, with its 95 % interval from the same resampled
  images. BETTER and WORSE need an interval that excludes 0: of twenty equals about one is called so. n/a: the method
  takes no tokens away.
- Interaction: speed-up of a stack / product of its parts' speed-ups, paired by turn; of lossy-ness the same with
  1 - lossy-ness. At 1 they multiply; parts that shorten different towers come out above it.
- Lossy-ness: 1 - quality / baseline's quality, with its 95 % interval; negative is better than the baseline. No loss is
  claimed only where two one-sided tests at 5 % put it within the margin.

</details>
"""

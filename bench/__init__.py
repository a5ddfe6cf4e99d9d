"""Speed, memory and parity of attention, ours and everyone else's, over one registry of cases.

    scenarios.py   what is computed: every mask, bias and stage, each with its textbook formula
    suites.py, cpu_suites.py   at which sizes: named lists of cases
    peers.py       by whom: fastattn, SDPA's backends, FlexAttention, nn.MultiheadAttention, the naive formula, ...
    gate.py        is it right: fp64 formula, budget of twice the same-precision error; nothing wrong is ever timed
    timing.py, memory.py, ceilings.py, roofline.py   how fast, how big, and how fast could it be
    goals.py       what the CPU kernels are held to, and whether they keep it
    results.py, report.py, goal_report.py   long-form CSV rows, tables for a terminal
    page.py, figures.py, readme.py          the same as an HTML page, and as the README's summary
    measure.py, runner.py                   one case, and the loop over all of them
    compare.py, against.py                  what changed between two runs, or two commits that take turns

Installed as ``fastattn.bench``; start it with ``python -m fastattn bench``.
"""

"""Speed, memory and parity of attention, ours and everyone else's, over one registry of cases.

    scenarios.py   what is computed: every mask, bias and stage, each with its textbook formula
    suites.py      at which sizes: named lists of cases
    peers.py       by whom: fastattn, SDPA's backends, FlexAttention, nn.MultiheadAttention, the naive formula, ...
    gate.py        is it right: fp64 formula, budget of twice the same-precision error; nothing wrong is ever timed
    timing.py, memory.py, ceilings.py   how fast, how big, and how fast could it be
    results.py, report.py, plots.py, readme.py   long-form CSV rows, terminal table, figures, README section
    runner.py      the loop over all of that

Installed as ``fastattn.bench``; start it with ``python -m fastattn bench``.
"""

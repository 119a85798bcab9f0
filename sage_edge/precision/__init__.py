"""Lower precision in the graph: FP16 casts, INT8 and FP8 Q/DQ, chosen for each layer, and the gate that judges the result.

plan.py     what is asked for: a precision for each module, or `auto`
layers.py   the layers of a refine graph that can be lowered
ranges.py   how large activations become, over real traces of all steps
formats.py  numbers: scales, INT8 and FP8 codes
rewrite.py  from the fp32 graph to the lowered one
gate.py     error of each step, drift, halting, accuracy, overflow headroom
search.py   which layers must stay higher
lower.py    all of it: from an fp32 bundle to a lowered bundle
plugin.py   the engine of a plugin, judged by the plugin's quality
"""

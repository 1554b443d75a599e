"""Share connections and status reads between the clients of one event loop.

A flow asks for its run with one ``runs/get`` a look. Here the looks that are asked for within a moment are
answered from the same pages of ``runs/list``, 100 active runs each; the flow does not notice. One that rests
is not even woken by a look that shows nothing new.
"""

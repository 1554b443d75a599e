"""Share connections and polls between the clients of one event loop.

A flow polls its run with ``runs/get``. Here the polls that are due at about the same moment are answered from
the same pages of ``runs/list``, 100 active runs each; the flow does not notice. A flow that waits for news is
woken only by news, or when its wait is due.
"""

"""Calls a module with low-rank updates of one of its parameters, above all the experts of a mixture.

- ``view``: the stand-in for the parameter, which the module reads while it runs. Products with it add the updates.
- ``updates``: the factors of all experts, in the order that the products need.
- ``calls``: puts the stand-in in place for the time of a call, and says when it cannot.
- ``traced``: what TorchDynamo needs to trace it.
"""

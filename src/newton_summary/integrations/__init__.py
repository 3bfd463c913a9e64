"""Thin bridges to other libraries, one a module, each with an extra of its own name.

* :mod:`newton_summary.integrations.tensorboard`
* :mod:`newton_summary.integrations.lightning`
* :mod:`newton_summary.integrations.transformers`
"""

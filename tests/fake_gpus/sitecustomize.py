"""Python imports this module where its folder is on PYTHONPATH: workers then compute on the CPU.

So tests of what happens around GPUs, such as their leases, need none.
"""

from fake_gpus import compute_on_cpu

compute_on_cpu()

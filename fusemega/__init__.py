"""fusemega: turn several trained language models into one better, or smaller, model, on Megatron-core."""

from fusemega.runtime.without_compiling import turn_off_where_no_gpu_is

__version__ = "0.1.0"

turn_off_where_no_gpu_is()

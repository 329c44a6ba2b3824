"""What benchmarks/throughput.py needs.

timing    side by side, network passes, where the time goes    subjects  the runs that are timed
gpu       full fine-tuning at full size                        scaling   processes, and models of any size
race      ours beside TRL's trainers                           peer      one side of it, in its own environment
"""

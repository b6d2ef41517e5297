"""Simulation of reinforcement learning on many GPUs: see simulate_scale.py in the folder above."""

"""Llama decoder, hierarchical model (backbone and depth decoder), and cross-entropy."""

"""Prompt upsampling: have an LLM turn a caller's short prompt into a detailed one."""

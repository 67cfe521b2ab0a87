"""The 54 seed papers: slug, short title, seams and state. What each claims and what was measured: docs/papers.md."""

from __future__ import annotations

from typing import NamedTuple


class Seed(NamedTuple):
    """One paper. `seams`: letters of the seams it touches, the main one first. `state` begins as in docs/papers.md."""

    slug: str
    title: str
    seams: str
    state: str


SEEDS = (
    Seed("adablock", "AdaBlock-dLLM: Semantic-Aware Diffusion LLM Inference via Adaptive Block Size", "E D", "not yet"),
    Seed("adaptive_compute", "Adaptive Inference-Time Compute: LLMs Can Predict if They Can Do Better, Even Mid-Generation", "H E D K", "not yet"),
    Seed("adrs", "Barbarians at the Gate: How AI is Upending Systems Research", "I", "not yet"),
    Seed("alisa", "ALISA: Accelerating LLM Inference via Sparsity-Aware KV Caching", "D F", "not yet"),
    Seed("apex", "Asynchronous Parallel CPU-GPU Execution for (Online) LLM Inference on Constrained GPUs (APEX)", "C B", "parts stand"),
    Seed("archon", "Archon: An Architecture Search Framework for Inference-Time Techniques", "H I", "not yet"),
    Seed("arcmemo", "ArcMemo: Abstract Reasoning Composition with Lifelong LLM Memory", "H D", "not yet"),
    Seed("aries", "ARIES: Autonomous Reasoning with LLMs on Interactive Thought Graph Environments", "H", "not yet"),
    Seed("astar", "A*-Decoding: Token-Efficient Inference Scaling", "E H D", "not yet"),
    Seed("batchllm", "BatchLLM: Optimizing Large Batched LLM Inference with Global Prefix Sharing and Throughput-oriented Token Batching", "A B D F", "not yet"),
    Seed("chain_of_abstraction", "Efficient Tool Use with Chain-of-Abstraction Reasoning", "H B E", "not yet"),
    Seed("clairvoyant", "Clairvoyant: Predictive SJF Scheduling to Mitigate Head-of-Line Blocking in Serial LLM Backends", "A G", "not yet"),
    Seed("cosine", "CoSine: Collaborative Speculative Inference for Efficient LLM Inference Serving", "E G B", "not yet"),
    Seed("del_split", "Differentially Private and Communication Efficient LLM Split Inference via Stochastic Quantization and Soft Prompt (DEL)", "J E F", "not yet"),
    Seed("energy_to_token", "Position: LLM Inference Should Be Evaluated as Energy-to-Token Production", "I G", "parts stand"),
    Seed("engines_survey", "A Survey on Inference Engines for LLMs: Perspectives on Optimization and Efficiency", "I A B C D E F", "parts stand"),
    Seed("flashdecoding_pp", "FlashDecoding++: Faster LLM Inference with Asynchronization, Flat GEMM Optimization, and Heuristics", "F", "parts stand"),
    Seed("flashinfer", "FlashInfer: Efficient and Customizable Attention Engine for LLM Inference Serving", "F B D", "parts stand"),
    Seed("ftp", "FTP: A Fine-grained Token-wise Pruner for LLMs via Token Routing", "F D B", "not yet"),
    Seed("hex_dllm", "HEX: Test-Time Scaling in Diffusion LLMs via Hidden Semi-Autoregressive Experts", "H E", "not yet"),
    Seed("hexgen_text2sql", "HexGen-Text2SQL: Optimizing LLM Inference Request Scheduling for Agentic Text-to-SQL Workflow", "G A H", "not yet"),
    Seed("hogwild", "Hogwild! Inference: Parallel LLM Generation via Concurrent Attention", "E D F", "not yet"),
    Seed("hyperparameters", "The Impact of Hyperparameters on LLM Inference Performance: An Evaluation of vLLM and HuggingFace Pipelines", "I", "not yet"),
    Seed("itq3s", "ITQ3_S: High-Fidelity 3-bit LLM Inference via Interleaved Ternary Quantization with Rotation-Domain Smoothing", "F", "not yet"),
    Seed("kv_strategies", "Comparative Characterization of KV Cache Management Strategies for LLM Inference", "I D A", "parts stand"),
    Seed("layered_prefill", "From Tokens to Layers: Redefining Stall-Free Scheduling for LLM Serving with Layered Prefill", "B F I", "not yet"),
    Seed("lite_llm4rec", "Rethinking LLM Architectures for Sequential Recommendations (Lite-LLM4Rec)", "H F E", "not yet"),
    Seed("llm42", "LLM-42: Enabling Determinism in LLM Inference with Verified Speculation", "E B I", "parts stand"),
    Seed("llm_viewer", "LLM Inference Unveiled: Survey and Roofline Model Insights (LLM-Viewer)", "I", "cost model stands"),
    Seed("llumnix", "Llumnix: Dynamic Scheduling for Large Language Model Serving", "G", "not yet"),
    Seed("lmql", "Prompting Is Programming: A Query Language for Large Language Models (LMQL)", "H E", "not yet"),
    Seed("lora_drop", "LoRA-Drop: Temporal LoRA Decoding for Efficient LLM Inference", "E F D", "not yet"),
    Seed("lrm_survey", "Efficient Inference for Large Reasoning Models: A Survey", "H E K I", "not yet"),
    Seed("nanoflow", "NanoFlow: Towards Optimal Large Language Model Serving Throughput", "B F D", "not yet"),
    Seed("optscale", "OptScale: Probabilistic Optimality for Inference-time Scaling", "H E", "not yet"),
    Seed("parrot", "Parrot: Efficient Serving of LLM-based Applications with Semantic Variable", "H A G D F", "not yet"),
    Seed("past_future", "Past-Future Scheduler for LLM Serving under SLA Guarantees", "A D", "not yet"),
    Seed("prunetir", "PruneTIR: Inference-Time Tool Call Pruning for Effective yet Efficient Tool-Integrated Reasoning", "H D", "not yet"),
    Seed("rllm_serving", "Reasoning Language Model Inference Serving Unveiled: An Empirical Study", "I D E F", "not yet"),
    Seed("rlot", "RL of Thoughts: Navigating LLM Reasoning with Inference-time Reinforcement Learning", "H", "not yet"),
    Seed("routing_survey", "Towards Efficient Multi-LLM Inference: Characterization and Analysis of LLM Routing and Hierarchical Techniques", "H G", "not yet"),
    Seed("saga", "SAGA: Workflow-Atomic Scheduling for AI Agent Inference on GPU Clusters", "H D G A", "not yet"),
    Seed("search_budget", "Inference-Time Budget Control for LLM Search Agents", "H A", "not yet"),
    Seed("silent_hyperparameter", "Silent Hyperparameter: Quantifying the Impact of Inference Backends on LLM Reproducibility", "I B D E F", "not yet"),
    Seed("solve_detect_verify", "Solve-Detect-Verify: Inference-Time Scaling with Flexible Generative Verifier", "H E", "not yet"),
    Seed("splitwise", "Splitwise: Efficient Generative LLM Inference Using Phase Splitting", "G I", "not yet"),
    Seed("stream2llm", "Stream2LLM: Overlap Context Streaming and Prefill for Reduced Time-to-First-Token", "A B D", "not yet"),
    Seed("think_deep", "Think Deep, Think Fast: Investigating Efficiency of Verifier-free Inference-time-scaling Methods", "I H", "not yet"),
    Seed("thunderagent", "ThunderAgent: A Simple, Fast and Program-Aware Agentic Inference System", "H A G D", "not yet"),
    Seed("tide", "TIDE: Efficient and Lossless MoE Diffusion LLM Inference with I/O-aware Expert Offload", "C E I", "not yet"),
    Seed("tpi_llm", "TPI-LLM: Serving 70B-scale LLMs Efficiently on Low-resource Edge Devices", "G C", "parts stand"),
    Seed("xllm", "xLLM Technical Report", "G B D E F", "not yet"),
    Seed("xlstm", "xLSTM 7B: A Recurrent LLM for Fast and Efficient Inference", "F D A B", "not yet"),
    Seed("zo_inference", "LLM Zeroth-Order Fine-Tuning is an Inference Workload", "K F A B", "not yet"),
)

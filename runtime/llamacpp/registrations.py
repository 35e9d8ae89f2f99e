"""Where llama.cpp must hear of the architecture: one table, beside `recurrentgemma.cpp`, which is all the rest.

A registration is a few lines of ours and the line of theirs that they stand at. It names that line by its words and not
by its number, so it holds while the tree around it grows.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Registration:
    """Lines for one place of one file of llama.cpp.

    `text` is put behind the line that reads `after`, or in front of the one that reads `before`. There must be just
    one: in the file, or, of the lines behind the one that reads `within`, up to the brace that closes a function. Lines
    are compared word by word, so spaces and indentation do not matter.
    """

    file: str
    text: str
    after: str = ""
    before: str = ""
    within: str = ""

    def __post_init__(self) -> None:
        assert bool(self.after) != bool(self.before), self.file

    @property
    def line(self) -> str:
        """The line of theirs that it stands at."""
        return self.after or self.before


#: The new file of the tree, with the contents of ours of the same name.
SOURCE = "src/models/recurrentgemma.cpp"

_ARCH = "LLM_ARCH_RECURRENTGEMMA"

REGISTRATIONS = (
    # -- names: the architecture, and the tensors that no other one has -----------------------------------
    Registration(
        "src/llama-arch.h",
        after="LLM_ARCH_GEMMA_EMBEDDING,",
        text=f"    {_ARCH},\n",
    ),
    Registration(
        "src/llama-arch.h",
        after="LLM_TENSOR_SSM_X,",
        text="""\
    LLM_TENSOR_SSM_Y,               // recurrentgemma
    LLM_TENSOR_SSM_GATE_I,          // recurrentgemma
    LLM_TENSOR_SSM_GATE_R,          // recurrentgemma
""",
    ),
    Registration(
        "src/llama-arch.cpp",
        after='{ LLM_ARCH_GEMMA_EMBEDDING, "gemma-embedding" },',
        text=f'    {{ {_ARCH},   "recurrentgemma"   }},\n',
    ),
    Registration(
        "src/llama-arch.cpp",
        after='{ LLM_TENSOR_SSM_X, "blk.%d.ssm_x" },',
        text="""\
    { LLM_TENSOR_SSM_Y,                                  "blk.%d.ssm_y" },
    { LLM_TENSOR_SSM_GATE_I,                             "blk.%d.ssm_gate_i" },
    { LLM_TENSOR_SSM_GATE_R,                             "blk.%d.ssm_gate_r" },
""",
    ),
    Registration(
        "src/llama-arch.cpp",
        after="{LLM_TENSOR_SSM_X, {LLM_TENSOR_LAYER_REPEATING, GGML_OP_MUL_MAT}},",
        text="""\
    {LLM_TENSOR_SSM_Y,                      {LLM_TENSOR_LAYER_REPEATING, GGML_OP_MUL_MAT}},
    {LLM_TENSOR_SSM_GATE_I,                 {LLM_TENSOR_LAYER_REPEATING, GGML_OP_MUL_MAT}},
    {LLM_TENSOR_SSM_GATE_R,                 {LLM_TENSOR_LAYER_REPEATING, GGML_OP_MUL_MAT}},
""",
    ),
    # -- what kind of architecture it is ------------------------------------------------------------------
    Registration(
        "src/llama-arch.cpp",
        within="bool llm_arch_is_hybrid(const llm_arch & arch) {",
        after="case LLM_ARCH_PLAMO2:",
        text=f"        case {_ARCH}:\n",
    ),
    Registration(
        "src/llama-arch.cpp",
        within="bool llm_arch_supports_rs_rollback(const llm_arch & arch) {",
        after="case LLM_ARCH_LFM2MOE:",
        text=f"        case {_ARCH}:\n",
    ),
    Registration(
        "src/llama-arch.cpp",
        within="bool llm_arch_supports_sm_tensor(const llm_arch & arch) {",
        after="case LLM_ARCH_PLAMO2:",
        text=f"        case {_ARCH}:\n",
    ),
    # -- sizes of the memory ------------------------------------------------------------------------------
    Registration(
        "src/llama-hparams.h",
        after="uint32_t ssm_n_group = 0;",
        text="""\

    // for RecurrentGemma: channels of the RG-LRU
    uint32_t n_embd_lru = 0;
""",
    ),
    Registration(
        "src/llama-hparams.cpp",
        after="uint32_t llama_hparams::n_embd_r() const {",
        text="""\
    if (n_embd_lru != 0) {
        // for RecurrentGemma: the last inputs of the convolution
        return n_embd_lru * (ssm_d_conv - 1);
    }

""",
    ),
    # -- the model ----------------------------------------------------------------------------------------
    Registration(
        "src/llama-model.h",
        after="struct ggml_tensor * ssm_alpha = nullptr;",
        text="""\

    // recurrentgemma
    struct ggml_tensor * ssm_y        = nullptr;
    struct ggml_tensor * ssm_gate_i   = nullptr;
    struct ggml_tensor * ssm_gate_r   = nullptr;
    struct ggml_tensor * ssm_x_b      = nullptr;
    struct ggml_tensor * ssm_y_b      = nullptr;
    struct ggml_tensor * ssm_out_b    = nullptr;
    struct ggml_tensor * ssm_gate_i_b = nullptr;
    struct ggml_tensor * ssm_gate_r_b = nullptr;
""",
    ),
    Registration(
        "src/llama-model.cpp",
        after="return new llama_model_gemma_embedding(params);",
        text=f"""\
        case {_ARCH}:
            return new llama_model_recurrentgemma(params);
""",
    ),
    Registration(
        "src/llama-model.cpp",
        after="arch == LLM_ARCH_PLAMO2 ||",
        text=f"                arch == {_ARCH} ||\n",
    ),
    Registration(
        "src/llama-model.cpp",
        within="llama_rope_type llama_model_rope_type(const llama_model * model) {",
        after="case LLM_ARCH_GEMMA_EMBEDDING:",
        text=f"        case {_ARCH}:\n",
    ),
    Registration(
        "src/llama-model.cpp",
        after="int32_t llama_model_n_swa(const llama_model * model) {",
        text=f"""\
    // the hidden states cannot be rolled back, however many keys and values there are
    // with n_swa here, a server would wait for keys of n_swa tokens and process every prompt from its beginning
    if (model->arch == {_ARCH}) {{
        return 0;
    }}
""",
    ),
    Registration(
        "src/models/models.h",
        before="struct llama_model_gemma_embedding : public llama_model_base {",
        text="""\
struct llama_model_recurrentgemma : public llama_model_base {
    llama_model_recurrentgemma(const struct llama_model_params & params) : llama_model_base(params) {}
    void load_arch_hparams(llama_model_loader & ml) override;
    void load_arch_tensors(llama_model_loader & ml) override;

    struct graph : public llm_graph_context {
        graph(const llama_model & model, const llm_graph_params & params);

        ggml_tensor * build_inp_keep(ggml_tensor * inp_pos) const;

        ggml_tensor * build_attention_block(
                const llama_model            & model,
                llm_graph_input_attn_kv_iswa * inp,
                ggml_tensor                  * cur,
                ggml_tensor                  * inp_pos,
                int                            il) const;

        ggml_tensor * build_recurrent_block(
                llm_graph_input_rs * inp,
                ggml_tensor        * cur,
                ggml_tensor        * inp_keep,
                const llama_layer  & layer,
                int                  il) const;

        ggml_tensor * build_conv(
                llm_graph_input_rs * inp,
                ggml_tensor        * x,
                const llama_layer  & layer,
                int                  il) const;

        ggml_tensor * build_rg_lru(
                llm_graph_input_rs * inp,
                ggml_tensor        * x,
                ggml_tensor        * inp_keep,
                const llama_layer  & layer,
                int                  il) const;

        ggml_tensor * build_gate(ggml_tensor * x, ggml_tensor * w, ggml_tensor * b) const;

        // every state, the last one
        std::pair<ggml_tensor *, ggml_tensor *> build_scan(ggml_tensor * a, ggml_tensor * b, ggml_tensor * h) const;
    };

    std::unique_ptr<llm_graph_context> build_arch_graph(const llm_graph_params & params) const override;
};


""",
    ),
    # -- the scan takes more nodes than a transformer's layer ---------------------------------------------
    Registration(
        "src/llama-context.cpp",
        within="uint32_t llama_context::graph_max_nodes(uint32_t n_tokens) const {",
        after="} else if (model.arch == LLM_ARCH_QWEN3NEXT ||",
        text=f"        model.arch == {_ARCH} ||\n",
    ),
    # -- shifting positions where a cache has no layers: the one without a window --------------------------
    Registration(
        "src/llama-kv-cache.cpp",
        after="void llama_kv_cache::set_input_k_shift(ggml_tensor * dst) const {",
        text="""\
    // no layer of a hybrid model may be in this cache, and then no node uses the input
    if (!dst->buffer) {
        return;
    }

""",
    ),
    # -- llama-quantize -----------------------------------------------------------------------------------
    Registration(
        "src/llama-quant.cpp",
        before="// for arches that share the same tensor between the token embeddings and the output, "
        "we quantize the token embeddings",
        text=f"""\
    // this stands above the rule for MXFP4_MOE, which takes every 3D weight for experts
    if (arch == {_ARCH}) {{
        // the gates are small, and the recurrence runs through them at every token
        if (name.find("ssm_gate_") != std::string::npos) {{
            return GGML_TYPE_Q8_0;
        }}
        // in Q2_K, the other projections of the recurrent blocks make half of a file's divergence
        if (ftype == LLAMA_FTYPE_MOSTLY_Q2_K && name.find("ssm_") != std::string::npos) {{
            return GGML_TYPE_Q3_K;
        }}
    }}

""",
    ),
    # -- the test that makes a small model of every architecture ------------------------------------------
    Registration(
        "tests/test-llama-archs.cpp",
        before="// dummy tokenizer: token ids are derived from fixed-size chunks and detokenized as hex ids",
        text=f"""\
    if (arch == {_ARCH}) {{
        ms.add_kv(LLM_KV_ATTENTION_RECURRENT_LAYERS, std::vector<uint32_t>({{1, 0}}));
        ms.add_kv(LLM_KV_FINAL_LOGIT_SOFTCAPPING,    30.0f);
        ms.add_kv(LLM_KV_EMBEDDING_SCALE,            16.0f);
    }}

""",
    ),
)

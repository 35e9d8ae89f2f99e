#include "models.h"
#include "../llama-memory-hybrid-iswa.h"
#include "../llama-memory-recurrent.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

// RecurrentGemma (ref: https://arxiv.org/abs/2404.07839) is a Griffin (ref: https://arxiv.org/abs/2402.19427)
// Two of three layers mix tokens by a gated linear recurrence (RG-LRU), the third by local attention; each is followed
// by an MLP. A sequence's memory does not grow: a recurrent layer holds its hidden state (cache_s) and the last inputs
// of its convolution (cache_r), an attention layer the keys and values of its window.

void llama_model_recurrentgemma::load_arch_hparams(llama_model_loader & ml) {
    ml.get_key(LLM_KV_ATTENTION_LAYERNORM_RMS_EPS, hparams.f_norm_rms_eps);
    ml.get_key(LLM_KV_ATTENTION_SLIDING_WINDOW,    hparams.n_swa);
    ml.get_key(LLM_KV_FINAL_LOGIT_SOFTCAPPING,     hparams.f_final_logit_softcapping);
    // sqrt(n_embd) rounded to bf16, as the model was trained: 50.5 for the 2B, not 50.596
    ml.get_key(LLM_KV_EMBEDDING_SCALE,             hparams.f_embedding_scale);

    ml.get_key(LLM_KV_SSM_CONV_KERNEL,             hparams.ssm_d_conv);
    ml.get_key(LLM_KV_SSM_INNER_SIZE,              hparams.ssm_d_inner);
    ml.get_key(LLM_KV_SSM_GROUP_COUNT,             hparams.ssm_n_group);
    hparams.ssm_d_state = 1;
    hparams.n_embd_lru  = hparams.ssm_d_inner;

    const auto check = [](bool valid, const char * what) {
        if (!valid) {
            throw std::runtime_error(std::string("recurrentgemma: ") + what);
        }
    };
    check(hparams.n_swa > 0,       "attention.sliding_window must be at least 1");
    check(hparams.ssm_d_conv >= 2, "ssm.conv_kernel must be at least 2");
    check(hparams.ssm_n_group > 0 && hparams.ssm_d_inner % hparams.ssm_n_group == 0,
            "ssm.inner_size must be a multiple of ssm.group_count");
    check(!hparams.is_n_embd_k_gqa_variable() && !hparams.is_n_embd_v_gqa_variable(),
            "attention.head_count_kv must be the same for all layers");
    check(hparams.n_embd_head_k_swa == hparams.n_embd_head_k_full &&
          hparams.n_embd_head_v_swa == hparams.n_embd_head_v_full,
            "attention.key_length_swa and value_length_swa must be those of all layers");
    check(hparams.n_rot_full > 0 && hparams.n_rot_full % 2 == 0 && hparams.n_rot_full <= hparams.n_embd_head_k_full,
            "rope.dimension_count must be even, above 0 and no more than attention.key_length");
    check(hparams.n_rot_swa == hparams.n_rot_full,
            "rope.dimension_count_swa must be rope.dimension_count");

    ml.get_key_or_arr(LLM_KV_ATTENTION_RECURRENT_LAYERS, hparams.is_recr_impl, hparams.n_layer_all);

    hparams.swa_type                  = LLAMA_SWA_TYPE_STANDARD;
    hparams.rope_freq_base_train_swa  = hparams.rope_freq_base_train;
    hparams.rope_freq_scale_train_swa = hparams.rope_freq_scale_train;
    bool any_recr = false;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        hparams.is_swa_impl[il] = !hparams.is_recr(il);
        any_recr |= hparams.is_recr(il);
    }
    check(any_recr, "attention.recurrent_layers names no layer");

    switch (hparams.n_layer()) {
        case 26: type = LLM_TYPE_2B; break;
        case 38: type = LLM_TYPE_9B; break;
        default: type = LLM_TYPE_UNKNOWN;
    }
}

void llama_model_recurrentgemma::load_arch_tensors(llama_model_loader &) {
    LLAMA_LOAD_LOCALS;

    const int64_t n_lru    = hparams.n_embd_lru;
    const int64_t n_block  = hparams.ssm_n_group; // the gates' weights are block-diagonal
    const int64_t n_gate   = n_lru/n_block;
    const int64_t d_conv   = hparams.ssm_d_conv;
    const int64_t n_embd_q = n_embd_head_k * n_head;

    tok_embd = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), {n_embd, n_vocab}, 0);

    output_norm = create_tensor(tn(LLM_TENSOR_OUTPUT_NORM, "weight"), {n_embd}, 0);
    output      = create_tensor(tn(LLM_TENSOR_OUTPUT,      "weight"), {n_embd, n_vocab}, TENSOR_NOT_REQUIRED);
    if (output == NULL) {
        output = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), {n_embd, n_vocab}, TENSOR_DUPLICATED);
    }

    for (int i = 0; i < n_layer; ++i) {
        auto & layer = layers[i];

        layer.attn_norm = create_tensor(tn(LLM_TENSOR_ATTN_NORM, "weight", i), {n_embd}, 0);
        layer.ffn_norm  = create_tensor(tn(LLM_TENSOR_FFN_NORM,  "weight", i), {n_embd}, 0);

        layer.ffn_gate   = create_tensor(tn(LLM_TENSOR_FFN_GATE, "weight", i), {n_embd, n_ff}, 0);
        layer.ffn_gate_b = create_tensor(tn(LLM_TENSOR_FFN_GATE, "bias",   i), {n_ff}, 0);
        layer.ffn_up     = create_tensor(tn(LLM_TENSOR_FFN_UP,   "weight", i), {n_embd, n_ff}, 0);
        layer.ffn_up_b   = create_tensor(tn(LLM_TENSOR_FFN_UP,   "bias",   i), {n_ff}, 0);
        layer.ffn_down   = create_tensor(tn(LLM_TENSOR_FFN_DOWN, "weight", i), {n_ff, n_embd}, 0);
        layer.ffn_down_b = create_tensor(tn(LLM_TENSOR_FFN_DOWN, "bias",   i), {n_embd}, 0);

        if (!hparams.is_recr(i)) {
            create_tensor_qkv(layer, i, n_embd, n_embd_q, n_embd_k_gqa, n_embd_v_gqa, 0);
            layer.wo   = create_tensor(tn(LLM_TENSOR_ATTN_OUT, "weight", i), {n_embd_q, n_embd}, 0);
            layer.wo_b = create_tensor(tn(LLM_TENSOR_ATTN_OUT, "bias",   i), {n_embd}, 0);
            continue;
        }

        layer.ssm_x     = create_tensor(tn(LLM_TENSOR_SSM_X,   "weight", i), {n_embd, n_lru}, 0);
        layer.ssm_x_b   = create_tensor(tn(LLM_TENSOR_SSM_X,   "bias",   i), {n_lru}, 0);
        layer.ssm_y     = create_tensor(tn(LLM_TENSOR_SSM_Y,   "weight", i), {n_embd, n_lru}, 0);
        layer.ssm_y_b   = create_tensor(tn(LLM_TENSOR_SSM_Y,   "bias",   i), {n_lru}, 0);
        layer.ssm_out   = create_tensor(tn(LLM_TENSOR_SSM_OUT, "weight", i), {n_lru, n_embd}, 0);
        layer.ssm_out_b = create_tensor(tn(LLM_TENSOR_SSM_OUT, "bias",   i), {n_embd}, 0);

        layer.ssm_conv1d   = create_tensor(tn(LLM_TENSOR_SSM_CONV1D, "weight", i), {d_conv, n_lru}, 0);
        layer.ssm_conv1d_b = create_tensor(tn(LLM_TENSOR_SSM_CONV1D, "bias",   i), {n_lru}, 0);

        layer.ssm_gate_i   = create_tensor(tn(LLM_TENSOR_SSM_GATE_I, "weight", i), {n_gate, n_gate, n_block}, 0);
        layer.ssm_gate_i_b = create_tensor(tn(LLM_TENSOR_SSM_GATE_I, "bias",   i), {n_lru}, 0);
        layer.ssm_gate_r   = create_tensor(tn(LLM_TENSOR_SSM_GATE_R, "weight", i), {n_gate, n_gate, n_block}, 0);
        layer.ssm_gate_r_b = create_tensor(tn(LLM_TENSOR_SSM_GATE_R, "bias",   i), {n_lru}, 0);

        // -8*softplus(the recurrent parameter): the logarithm of the strongest decay
        layer.ssm_a = create_tensor(tn(LLM_TENSOR_SSM_A_NOSCAN, i), {n_lru}, 0);
    }
}

std::unique_ptr<llm_graph_context> llama_model_recurrentgemma::build_arch_graph(const llm_graph_params & params) const {
    return std::make_unique<graph>(*this, params);
}

llama_model_recurrentgemma::graph::graph(const llama_model & model, const llm_graph_params & params) :
    llm_graph_context(params) {
    ggml_tensor * cur;
    ggml_tensor * inpL = build_inp_embd(model.tok_embd); // scaled by hparams.f_embedding_scale in there

    auto * inp = build_inp_mem_hybrid_iswa();

    ggml_tensor * inp_pos     = build_inp_pos();
    ggml_tensor * inp_keep   = build_inp_keep(inp_pos);
    ggml_tensor * inp_out_ids = build_inp_out_ids();

    for (int il = 0; il < n_layer; ++il) {
        const auto & layer = model.layers[il];

        res->t_layer_inp[il] = inpL;

        cur = build_norm(inpL, layer.attn_norm, NULL, LLM_NORM_RMS, il);
        cb(cur, "attn_norm", il);

        if (hparams.is_recr(il)) {
            cur = build_recurrent_block(inp->get_recr(), cur, inp_keep, layer, il);
        } else {
            cur = build_attention_block(model, inp->get_attn(), cur, inp_pos, il);
        }

        if (il == n_layer - 1 && inp_out_ids) {
            cur  = ggml_get_rows(ctx0, cur,  inp_out_ids);
            inpL = ggml_get_rows(ctx0, inpL, inp_out_ids);
        }

        ggml_tensor * residual = ggml_add(ctx0, cur, inpL);
        cb(residual, "ffn_inp", il);

        cur = build_norm(residual, layer.ffn_norm, NULL, LLM_NORM_RMS, il);
        cb(cur, "ffn_norm", il);

        cur = build_ffn(cur,
                layer.ffn_up,   layer.ffn_up_b,   NULL,
                layer.ffn_gate, layer.ffn_gate_b, NULL,
                layer.ffn_down, layer.ffn_down_b, NULL,
                NULL, LLM_FFN_GELU, LLM_FFN_PAR, il);
        cb(cur, "ffn_out", il);

        cur = ggml_add(ctx0, cur, residual);
        cur = build_cvec(cur, il);
        cb(cur, "l_out", il);

        inpL = cur;
    }

    cur = build_norm(inpL, model.output_norm, NULL, LLM_NORM_RMS, -1);
    cb(cur, "result_norm", -1);
    res->t_embd = cur;

    if (!cparams.embeddings) {
        cur = build_lora_mm(model.output, cur, model.output_s);

        if (hparams.f_final_logit_softcapping) {
            cur = ggml_scale(ctx0, cur, 1.0f / hparams.f_final_logit_softcapping);
            cur = ggml_tanh (ctx0, cur);
            cur = ggml_scale(ctx0, cur, hparams.f_final_logit_softcapping);
        }
        cb(cur, "result_output", -1);
        res->t_logits = cur;
    }

    ggml_build_forward_expand(gf, cur);
}

// [n_lru, 1, n_seqs]: 0 where a sequence begins with this ubatch, else 1. Only its first token can be at position 0.
ggml_tensor * llama_model_recurrentgemma::graph::build_inp_keep(ggml_tensor * inp_pos) const {
    const int64_t n_seqs = ubatch.n_seqs;

    ggml_tensor * first = ggml_view_2d(ctx0, inp_pos, 1, n_seqs, ubatch.n_seq_tokens*inp_pos->nb[0], 0);
    ggml_tensor * keep  = ggml_step(ctx0, ggml_cast(ctx0, first, GGML_TYPE_F32));

    keep = ggml_repeat_4d(ctx0, ggml_reshape_3d(ctx0, keep, 1, 1, n_seqs), hparams.n_embd_lru, 1, n_seqs, 1);
    cb(keep, "inp_keep", -1);
    return keep;
}

ggml_tensor * llama_model_recurrentgemma::graph::build_attention_block(
        const llama_model            & model,
        llm_graph_input_attn_kv_iswa * inp,
        ggml_tensor                  * cur,
        ggml_tensor                  * inp_pos,
        int                            il) const {
    const auto & layer = model.layers[il];

    const float freq_base_l  = model.get_rope_freq_base (cparams, il);
    const float freq_scale_l = model.get_rope_freq_scale(cparams, il);

    auto [q, k, v] = build_qkv(layer, cur, n_embd_head_k, n_head, n_head_kv, il);

    // only the first n_rot dimensions are turned: half of a head
    q = ggml_rope_ext(ctx0, q, inp_pos, nullptr, n_rot, rope_type, n_ctx_orig, freq_base_l, freq_scale_l,
            ext_factor, attn_factor, beta_fast, beta_slow);
    k = ggml_rope_ext(ctx0, k, inp_pos, nullptr, n_rot, rope_type, n_ctx_orig, freq_base_l, freq_scale_l,
            ext_factor, attn_factor, beta_fast, beta_slow);
    cb(q, "Qcur", il);
    cb(k, "Kcur", il);

    cur = build_attn(inp, layer.wo, layer.wo_b, layer.wo_s,
            q, k, v, nullptr, nullptr, nullptr, 1.0f/sqrtf(float(n_embd_head_k)), il);
    cb(cur, "attn_out", il);
    return cur;
}

// two branches meet: RG-LRU(conv(W_x u)) * gelu(W_y u), then W_out
ggml_tensor * llama_model_recurrentgemma::graph::build_recurrent_block(
        llm_graph_input_rs * inp,
        ggml_tensor        * cur,
        ggml_tensor        * inp_keep,
        const llama_layer  & layer,
        int                  il) const {
    ggml_tensor * x = ggml_add(ctx0, build_lora_mm(layer.ssm_x, cur), layer.ssm_x_b);
    cb(x, "lru_x", il);

    ggml_tensor * y = ggml_add(ctx0, build_lora_mm(layer.ssm_y, cur), layer.ssm_y_b);
    cb(y, "lru_y", il);

    x = build_conv(inp, x, layer, il);
    x = build_rg_lru(inp, x, inp_keep, layer, il);

    cur = ggml_geglu_split(ctx0, y, ggml_reshape_2d(ctx0, x, x->ne[0], n_tokens));
    cb(cur, "lru_gated", il);

    cur = ggml_add(ctx0, build_lora_mm(layer.ssm_out, cur, layer.ssm_out_s), layer.ssm_out_b);
    cb(cur, "lru_out", il);
    return cur;
}

// where the state of the ubatch's sequences goes in a cache: slot s is for the state as of s tokens before the last one
static ggml_tensor * state_slot(
        ggml_context                         * ctx0,
        const llama_memory_recurrent_context * mctx,
        ggml_tensor                          * cache,
        int64_t                                n_state,
        int64_t                                n_seqs,
        int64_t                                slot) {
    const size_t row_size = ggml_row_size(cache->type, n_state);

    return ggml_view_2d(ctx0, cache, n_state, n_seqs, row_size, (slot*mctx->get_size() + mctx->get_head())*row_size);
}

// how many states of a sequence are kept: the last one, and those that a rollback may go back to
static int64_t n_slots(const llama_cparams & cparams, int64_t n_seq_tokens) {
    // [TAG_RECURRENT_ROLLBACK_SPLITS]: a sequence's last (1 + n_rs_seq) tokens are in one ubatch
    return std::min<int64_t>(n_seq_tokens, 1 + cparams.n_rs_seq);
}

// causal depthwise convolution over the inputs kept from before and the new ones: [n_lru, n_seq_tokens, n_seqs]
ggml_tensor * llama_model_recurrentgemma::graph::build_conv(
        llm_graph_input_rs * inp,
        ggml_tensor        * x,
        const llama_layer  & layer,
        int                  il) const {
    const int64_t n_lru        = hparams.n_embd_lru;
    const int64_t n_kept       = hparams.ssm_d_conv - 1;
    const int64_t n_seqs       = ubatch.n_seqs;
    const int64_t n_seq_tokens = ubatch.n_seq_tokens;

    ggml_tensor * cache = inp->mctx->get_r_l(il);
    ggml_tensor * kept  = build_rs(inp, cache, hparams.n_embd_r(), n_seqs);
    kept = ggml_reshape_3d(ctx0, kept, n_kept, n_lru, n_seqs);

    x = ggml_transpose(ctx0, ggml_reshape_3d(ctx0, x, n_lru, n_seq_tokens, n_seqs));
    x = ggml_concat(ctx0, kept, x, 0); // [n_kept + n_seq_tokens, n_lru, n_seqs]

    for (int64_t slot = 0; slot < n_slots(cparams, n_seq_tokens); ++slot) {
        ggml_tensor * last = ggml_view_3d(ctx0, x, n_kept, n_lru, n_seqs,
                x->nb[1], x->nb[2], (n_seq_tokens - slot)*x->nb[0]);
        ggml_build_forward_expand(gf,
                ggml_cpy(ctx0, last, state_slot(ctx0, inp->mctx, cache, hparams.n_embd_r(), n_seqs, slot)));
    }

    x = ggml_add(ctx0, ggml_ssm_conv(ctx0, x, layer.ssm_conv1d), layer.ssm_conv1d_b);
    cb(x, "lru_conv", il);
    return x;
}

// real-gated linear recurrent unit, x: [n_lru, n_seq_tokens, n_seqs]
//     i, r  = sigmoid(gates(x));   log a = r * -8*softplus(the recurrent parameter)
//     h_t   = a_t*h_{t-1} + sqrt(1 - a_t^2)*i_t*x_t;   at position 0, a = 0
ggml_tensor * llama_model_recurrentgemma::graph::build_rg_lru(
        llm_graph_input_rs * inp,
        ggml_tensor        * x,
        ggml_tensor        * inp_keep,
        const llama_layer  & layer,
        int                  il) const {
    const int64_t n_lru        = hparams.n_embd_lru;
    const int64_t n_seqs       = ubatch.n_seqs;
    const int64_t n_seq_tokens = ubatch.n_seq_tokens;

    ggml_tensor * cache = inp->mctx->get_s_l(il);
    ggml_tensor * h     = ggml_reshape_3d(ctx0, build_rs(inp, cache, hparams.n_embd_s(), n_seqs), n_lru, 1, n_seqs);

    ggml_tensor * i = build_gate(x, layer.ssm_gate_i, layer.ssm_gate_i_b);
    ggml_tensor * r = build_gate(x, layer.ssm_gate_r, layer.ssm_gate_r_b);
    cb(i, "lru_gate_i", il);
    cb(r, "lru_gate_r", il);

    ggml_tensor * a     = ggml_exp(ctx0, ggml_mul(ctx0, r, layer.ssm_a));
    ggml_tensor * first = ggml_view_3d(ctx0, a, n_lru, 1, n_seqs, a->nb[1], a->nb[2], 0);
    first = ggml_mul_inplace(ctx0, first, inp_keep);
    a = ggml_view_3d(ctx0, first, n_lru, n_seq_tokens, n_seqs, a->nb[1], a->nb[2], 0);
    cb(a, "lru_a", il);

    ggml_tensor * m = ggml_sqrt(ctx0, ggml_scale_bias(ctx0, ggml_sqr(ctx0, a), -1.0f, 1.0f));
    ggml_tensor * b = ggml_mul(ctx0, ggml_mul(ctx0, i, x), m);

    auto [every_h, last_h] = build_scan(a, b, h);
    cb(every_h, "lru_h", il);

    for (int64_t slot = 0; slot < n_slots(cparams, n_seq_tokens); ++slot) {
        ggml_tensor * kept = slot == 0 ? last_h : ggml_view_3d(ctx0, every_h, n_lru, 1, n_seqs,
                every_h->nb[1], every_h->nb[2], (n_seq_tokens - 1 - slot)*every_h->nb[1]);
        ggml_build_forward_expand(gf,
                ggml_cpy(ctx0, kept, state_slot(ctx0, inp->mctx, cache, hparams.n_embd_s(), n_seqs, slot)));
    }

    return every_h;
}

// sigmoid(x @ w + b) with a block-diagonal w: [n_lru/n_block, n_lru/n_block, n_block]
ggml_tensor * llama_model_recurrentgemma::graph::build_gate(ggml_tensor * x, ggml_tensor * w, ggml_tensor * b) const {
    const int64_t n_embd_block = w->ne[0];
    const int64_t n_block      = w->ne[2];

    ggml_tensor * cur = ggml_permute(ctx0, ggml_reshape_3d(ctx0, x, n_embd_block, n_block, n_tokens), 0, 2, 1, 3);

    cur = build_lora_mm(w, cur); // [n_embd_block, n_tokens, n_block]
    cur = ggml_cont(ctx0, ggml_permute(ctx0, cur, 0, 2, 1, 3));
    cur = ggml_reshape_3d(ctx0, cur, x->ne[0], x->ne[1], x->ne[2]);

    return ggml_sigmoid(ctx0, ggml_add(ctx0, cur, b));
}

// operations of build_scan for so many tokens in blocks of so many
static int64_t n_scan_ops(int64_t n_seq_tokens, int64_t n_in_block) {
    return 3*n_in_block + 2*(n_seq_tokens/n_in_block) + 2*(n_seq_tokens%n_in_block);
}

// h_t = a_t*h_{t-1} + b_t, from h on. Returns every h_t, in the place of b, and the last one; a is overwritten.
// a, b: [n_lru, n_seq_tokens, n_seqs], h: [n_lru, 1, n_seqs]
//
// There is no operation for it, but mul and add do it in few steps if the tokens are taken in blocks:
//   1. in all blocks at once, from token to token, as if nothing had been before; a becomes its running product
//   2. from block to block, what their last tokens get from before; then the tokens behind the last whole block
//   3. for all other tokens of the blocks: h_t += (a_t*...*a_first)*(the h before the block)
//
// What was done in place is read through a view of its result: so the allocator knows when a buffer is free again.
std::pair<ggml_tensor *, ggml_tensor *> llama_model_recurrentgemma::graph::build_scan(
        ggml_tensor * a,
        ggml_tensor * b,
        ggml_tensor * h) const {
    const int64_t n_lru        = b->ne[0];
    const int64_t n_seq_tokens = b->ne[1];
    const int64_t n_seqs       = b->ne[2];

    int64_t n_in_block = 1;
    for (int64_t n = 2; n <= std::min<int64_t>(n_seq_tokens, 32); ++n) {
        if (n_scan_ops(n_seq_tokens, n) < n_scan_ops(n_seq_tokens, n_in_block)) {
            n_in_block = n;
        }
    }
    const int64_t n_block = n_seq_tokens/n_in_block;

    const size_t nb_token = b->nb[1];
    const size_t nb_block = b->nb[1]*n_in_block;
    const size_t nb_seq   = b->nb[2];

    // token j of every block, and of that the tokens of n blocks from block m on
    const auto column = [&](ggml_tensor * t, int64_t j) {
        return ggml_view_3d(ctx0, t, n_lru, n_block, n_seqs, nb_block, nb_seq, j*nb_token);
    };
    const auto blocks = [&](ggml_tensor * t, int64_t m, int64_t n) {
        return ggml_view_3d(ctx0, t, n_lru, n, n_seqs, nb_block, nb_seq, m*nb_block);
    };

    // 1.
    ggml_tensor * product = column(a, 0);
    ggml_tensor * local   = column(b, 0);
    for (int64_t j = 1; j < n_in_block; ++j) {
        ggml_tensor * step = column(a, j);

        local = ggml_add_inplace(ctx0, column(b, j), ggml_mul(ctx0, step, local));
        ggml_build_forward_expand(gf, local);

        product = ggml_mul_inplace(ctx0, step, product);
        ggml_build_forward_expand(gf, product);
    }

    // 2.
    ggml_tensor * before = h;
    const auto go_on = [&](ggml_tensor * a_t, ggml_tensor * b_t) {
        h = ggml_add_inplace(ctx0, b_t, ggml_mul(ctx0, a_t, h));
        ggml_build_forward_expand(gf, h);
    };
    for (int64_t m = 0; m < n_block; ++m) {
        go_on(blocks(product, m, 1), blocks(local, m, 1));
    }
    for (int64_t t = n_block*n_in_block; t < n_seq_tokens; ++t) {
        go_on(ggml_view_3d(ctx0, a, n_lru, 1, n_seqs, nb_token, nb_seq, t*nb_token),
              ggml_view_3d(ctx0, b, n_lru, 1, n_seqs, nb_token, nb_seq, t*nb_token));
    }
    if (n_in_block == 1) {
        return { b, h };
    }

    // 3.
    const auto others = [&](ggml_tensor * t) {
        return ggml_view_4d(ctx0, t, n_lru, n_in_block - 1, n_block, n_seqs, nb_token, nb_block, nb_seq, 0);
    };
    if (n_block > 1) {
        before = ggml_concat(ctx0, before, blocks(local, 0, n_block - 1), 1);
    }
    before = ggml_reshape_4d(ctx0, before, n_lru, 1, n_block, n_seqs);

    ggml_tensor * carried = ggml_mul_inplace(ctx0, others(a), before);
    ggml_tensor * cur     = ggml_add_inplace(ctx0, others(b), carried);
    ggml_build_forward_expand(gf, cur);

    return { ggml_view_3d(ctx0, cur, n_lru, n_seq_tokens, n_seqs, nb_token, nb_seq, 0), h };
}

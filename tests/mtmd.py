"""llama.cpp's own reader and graph of `mmproj` files, to show that the tests' files have the real format."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from llama_cpp import mtmd_cpp as native
from numpy.typing import NDArray

from edgevlm.llama import library


def embeddings(text: Path, mmproj: Path, image_HWC: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """What llama.cpp feeds its decoder for one picture: for each tile, in the order of the prompt, [tokens, n_embd]."""
    llama = library()
    keep = native.llama_cpp.llama_log_callback(lambda level, line, data: None)
    native.mtmd_log_set(keep, None)
    native.mtmd_helper_log_set(keep, None)
    model = llama.llama_model_load_from_file(str(text).encode(), llama.llama_model_default_params())
    params = native.mtmd_context_params_default()
    params.use_gpu = params.print_timings = params.warmup = False
    params.n_threads = 1
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED  # float32 all the way
    context = native.mtmd_init_from_file(str(mmproj).encode(), model, params)
    assert context, "llama.cpp refuses the mmproj"
    height, width, _ = image_HWC.shape
    data = np.ascontiguousarray(image_HWC)
    bitmap = native.mtmd_bitmap_init(width, height, data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    prompt = native.mtmd_default_marker()
    chunks = native.mtmd_input_chunks_init()
    asked = native.mtmd_input_text(prompt, len(prompt), False, True)
    bitmaps = (native.mtmd_bitmap_p_ctypes * 1)(bitmap)
    assert native.mtmd_tokenize(context, chunks, ctypes.byref(asked), bitmaps, 1) == 0
    found = []
    for i in range(native.mtmd_input_chunks_size(chunks)):
        chunk = native.mtmd_input_chunks_get(chunks, i)
        if native.mtmd_input_chunk_get_type(chunk) != native.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            continue
        assert native.mtmd_encode_chunk(context, chunk) == 0
        shape = (native.mtmd_input_chunk_get_n_tokens(chunk), llama.llama_model_n_embd_inp(model))
        found.append(np.ctypeslib.as_array(native.mtmd_get_output_embd(context), shape).copy())
    native.mtmd_input_chunks_free(chunks)
    native.mtmd_bitmap_free(bitmap)
    native.mtmd_free(context)
    llama.llama_model_free(model)
    return found

// Calls functions of a shared object of CPU kernels with memory that comes over standard input, and writes back what
// they made of it: run by qemu-user for another architecture, it stands for the library. emulator.py is the other side.
//
//   emulated LIBRARY FUNCTION...
//
// A request is 64-bit numbers: the function, blocks, how many of the first ones are not to be returned, pointers; the
// blocks' sizes; for each pointer its block, its place in there, the block that it points into, and where. Then the
// blocks' bytes. The first block is the function's structure.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

static bool read_all(void* to, size_t bytes) { return bytes == 0 || fread(to, bytes, 1, stdin) == 1; }

[[noreturn]] static void fail(const char* why) {
    fprintf(stderr, "%s\n", why);
    exit(1);
}

int main(int count, char** arguments) {
    constexpr size_t kFence = 64;  // bytes behind a block that must stay as they are
    void* const library = count > 1 ? dlopen(arguments[1], RTLD_NOW) : nullptr;
    if (library == nullptr) fail(dlerror());
    std::vector<void (*)(void*, const void*)> functions;
    for (int i = 2; i < count; i++) functions.push_back((void (*)(void*, const void*))dlsym(library, arguments[i]));
    void* const context = ((void* (*)(void*, int))dlsym(library, "vsl_create"))(nullptr, 1);
    puts(((const char* (*)(void*))dlsym(library, "vsl_instruction_set"))(context));
    fflush(stdout);
    for (uint64_t head[4]; read_all(head, sizeof head);) {
        std::vector<uint64_t> sizes(head[1]), pointers(4 * head[3]);
        if (!read_all(sizes.data(), 8 * sizes.size()) || !read_all(pointers.data(), 8 * pointers.size())) fail("cut off");
        std::vector<char*> blocks;
        for (const uint64_t size : sizes) {
            blocks.push_back((char*)aligned_alloc(64, (size + kFence + 63) / 64 * 64));
            if (!read_all(blocks.back(), size)) fail("cut off");
            memset(blocks.back() + size, 0xa5, kFence);
        }
        for (size_t i = 0; i < pointers.size(); i += 4) {
            char* const target = blocks[pointers[i + 2]] + pointers[i + 3];
            memcpy(blocks[pointers[i]] + pointers[i + 1], &target, sizeof target);
        }
        functions[head[0]](context, blocks[0]);
        for (size_t i = 0; i < blocks.size(); i++) {
            for (size_t j = 0; j < kFence; j++)
                if ((unsigned char)blocks[i][sizes[i] + j] != 0xa5) fail("a function wrote beyond its memory");
            if (i >= head[2]) fwrite(blocks[i], 1, sizes[i], stdout);
            free(blocks[i]);
        }
        fflush(stdout);
    }
}

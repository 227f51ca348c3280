/* An emulator of the AMX-BF16 tile instructions, to be preloaded into a process on a processor without them.
 *
 * Each tile instruction raises SIGILL. The handler decodes it, executes it on the thread's emulated tiles as in Intel's
 * Software Developer's Manual (volume 2, LDTILECFG to TILEZERO), and continues behind it. What would fault on a
 * processor (no permission, no configuration, shapes that do not fit) ends the process with a message and SIGABRT.
 *
 * Linux's answer to the request for permission is emulated as well: AMX_REFUSED=errno refuses it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <immintrin.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };
enum { NONE, P66, PF3, PF2 }; /* the prefix that a VEX prefix stands for */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} Shapes;

static __thread __attribute__((tls_model("initial-exec"))) struct {
    Shapes shapes; /* palette 0: no tiles are configured */
    long executed;
    uint8_t data[TILES][ROWS][ROW_BYTES];
} tiles;
static int permitted;

/* What tests ask for: whether the calling thread's tiles are configured, and how many instructions it has executed. */
int amx_configured(void) { return tiles.shapes.palette != 0; }
long amx_executed(void) { return tiles.executed; }

/* Replaces the C library's function. Only one request is answered here. */
long syscall(long number, ...) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    long a[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_arch_prctl && a[0] == ARCH_REQ_XCOMP_PERM && a[1] == XFEATURE_XTILEDATA) {
        const char *refused = getenv("AMX_REFUSED");
        permitted = !refused;
        if (refused) errno = atoi(refused);
        return refused ? -1 : 0;
    }
    register long r10 __asm__("r10") = a[3], r8 __asm__("r8") = a[4], r9 __asm__("r9") = a[5];
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    if (result >= 0 || result < -4095) return result;
    errno = (int)-result;
    return -1;
}

static void require(int condition, const char *instruction, const char *rule) {
    if (condition) return;
    char message[200];
    const int length = snprintf(message, sizeof message, "amx_emulator: %s: %s\n", instruction, rule);
    if (write(STDERR_FILENO, message, length) == length) abort();
    abort();
}

static void require_tile(int tile, const char *instruction) {
    require(permitted, instruction, "the process has no permission to use tiles");
    require(tiles.shapes.palette != 0, instruction, "no tiles are configured");
    require(tile < TILES && tiles.shapes.rows[tile] > 0, instruction, "the tile is not configured");
}

static void load_config(const Shapes *from) {
    static const char *const name = "ldtilecfg";
    require(permitted, name, "the process has no permission to use tiles");
    require(from->palette <= 1, name, "the palette is neither 0 nor 1");
    require(from->start_row == 0, name, "the start row is not 0");
    for (int i = 0; i < 14; i++) require(from->reserved[i] == 0, name, "reserved bytes are not 0");
    for (int i = 0; i < 16; i++) {
        require(i < TILES || (from->rows[i] == 0 && from->row_bytes[i] == 0), name, "there are more than 8 tiles");
        require(from->rows[i] <= ROWS, name, "a tile has more than 16 rows");
        require(from->row_bytes[i] <= ROW_BYTES, name, "a row has more than 64 bytes");
        require((from->rows[i] == 0) == (from->row_bytes[i] == 0), name, "a tile has rows or bytes but not both");
    }
    memset(tiles.data, 0, sizeof tiles.data);
    if (from->palette)
        tiles.shapes = *from;
    else
        memset(&tiles.shapes, 0, sizeof tiles.shapes);
}

static void load_tile(int tile, const char *base, long stride) {
    require_tile(tile, "tileloadd");
    memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
    for (int row = 0; row < tiles.shapes.rows[tile]; row++)
        memcpy(tiles.data[tile][row], base + row * stride, tiles.shapes.row_bytes[tile]);
}

static void store_tile(int tile, char *base, long stride) {
    require_tile(tile, "tilestored");
    for (int row = 0; row < tiles.shapes.rows[tile]; row++)
        memcpy(base + row * stride, tiles.data[tile][row], tiles.shapes.row_bytes[tile]);
}

static float widen(uint16_t value) {
    const uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* Even and odd products are summed apart, from 0, each rounded once (FMA); then both sums are added to the tile. */
static void multiply(int to, int first, int second) {
    static const char *const name = "tdpbf16ps";
    require_tile(to, name), require_tile(first, name), require_tile(second, name);
    const uint8_t *rows = tiles.shapes.rows;
    const uint16_t *row_bytes = tiles.shapes.row_bytes;
    require(to != first && to != second && first != second, name, "two tiles are the same");
    require(row_bytes[to] % 4 + row_bytes[first] % 4 + row_bytes[second] % 4 == 0, name, "a row has a half element");
    require(rows[to] == rows[first], name, "the sums have not as many rows as the first factor");
    require(row_bytes[first] / 4 == rows[second], name, "the first factor has not as many pairs as the second has rows");
    require(row_bytes[to] == row_bytes[second], name, "the sums have not as many columns as the second factor");
    const unsigned control = _mm_getcsr();
    _mm_setcsr(_MM_MASK_MASK | _MM_FLUSH_ZERO_ON | 0x40); /* round to nearest; denormals are 0, read or written */
    for (int m = 0; m < rows[to]; m++) {
        uint16_t x[2 * ROWS], y[2 * ROWS];
        float sums[2 * ROWS] = {0}, totals[ROWS];
        memcpy(x, tiles.data[first][m], sizeof x);
        memcpy(totals, tiles.data[to][m], sizeof totals);
        for (int k = 0; k < rows[second]; k++) {
            memcpy(y, tiles.data[second][k], sizeof y);
            for (int n = 0; n < 2 * ROWS; n++) sums[n] = fmaf(widen(x[2 * k + n % 2]), widen(y[n]), sums[n]);
        }
        for (int n = 0; n < row_bytes[to] / 4; n++) totals[n] += sums[2 * n] + sums[2 * n + 1];
        memcpy(tiles.data[to][m], totals, sizeof totals);
    }
    memset(tiles.data[to][rows[to]], 0, (ROWS - rows[to]) * ROW_BYTES);
    _mm_setcsr(control);
}

/* Operands of an instruction with a VEX prefix of 3 bytes. */
typedef struct {
    int mod, reg, rm, vvvv, length;
    char *base;   /* with the displacement */
    long stride; /* the scaled index register */
} Operands;

static Operands decode(const uint8_t *code, const greg_t *registers) {
    static const int numbers[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    const int x = (~code[1] >> 6 & 1) * 8, b = (~code[1] >> 5 & 1) * 8, modrm = code[4];
    Operands found = {modrm >> 6, modrm >> 3 & 7, modrm & 7, ~code[2] >> 3 & 15, 5, NULL, 0};
    if (found.mod == 3) return found;
    int base = found.rm, has_base = 1;
    if (found.rm == 4) {
        const int sib = code[found.length++], index = (sib >> 3 & 7) + x;
        base = sib & 7;
        if (index != 4) found.stride = registers[numbers[index]] << (sib >> 6);
    }
    int32_t displacement = 0;
    if (found.mod == 1) {
        displacement = (int8_t)code[found.length++];
    } else if (found.mod == 2 || base == 5) {
        has_base = found.mod == 2;
        memcpy(&displacement, code + found.length, 4);
        found.length += 4;
    }
    long address = has_base ? registers[numbers[base + b]] : 0;
    if (!has_base && found.rm == 5) address = (long)code + found.length; /* relative to the next instruction */
    found.base = (char *)(address + displacement);
    return found;
}

/* Execute the instruction at `code`; return its length, or 0 if it is none of AMX's. */
static int execute(const uint8_t *code, const greg_t *registers) {
    if (code[0] != 0xc4 || (code[1] & 0x9f) != 0x82 || (code[2] & 0x84) != 0) return 0; /* map 0F38, 128 bits, W0 */
    const int prefix = code[2] & 3, opcode = code[3];
    const Operands found = decode(code, registers);
    const int in_memory = found.mod != 3, tile_in_memory = in_memory && found.rm == 4;
    if (opcode == 0x49 && prefix == NONE && in_memory && found.reg == 0)
        load_config((const Shapes *)(found.base + found.stride));
    else if (opcode == 0x49 && prefix == NONE && code[4] == 0xc0)
        memset(&tiles.shapes, 0, sizeof tiles.shapes);
    else if (opcode == 0x49 && prefix == P66 && in_memory && found.reg == 0)
        memcpy(found.base + found.stride, &tiles.shapes, sizeof tiles.shapes);
    else if (opcode == 0x49 && prefix == PF2 && !in_memory && found.rm == 0)
        require_tile(found.reg, "tilezero"), memset(tiles.data[found.reg], 0, sizeof tiles.data[0]);
    else if (opcode == 0x4b && (prefix == PF2 || prefix == P66) && tile_in_memory)
        load_tile(found.reg, found.base, found.stride);
    else if (opcode == 0x4b && prefix == PF3 && tile_in_memory)
        store_tile(found.reg, found.base, found.stride);
    else if (opcode == 0x5c && prefix == PF3 && !in_memory)
        multiply(found.reg, found.rm, found.vvvv);
    else
        return 0;
    tiles.executed++;
    return found.length;
}

static void handle(int number, siginfo_t *info, void *context) {
    (void)info;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const long executed = tiles.executed;
    for (int length; (length = execute((const uint8_t *)registers[REG_RIP], registers)) > 0;)
        registers[REG_RIP] += length; /* neighbors at once: a signal takes microseconds */
    if (tiles.executed == executed) signal(number, SIG_DFL); /* raised again, now with its usual effect */
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGILL, &action, NULL);
}

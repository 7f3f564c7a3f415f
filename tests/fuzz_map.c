// SPDX-License-Identifier: GPL-2.0-only
/*
 * Block states of a device would be wrong, or memory lost, after some sequence
 * of writes, discards, growth and failed allocations.
 *
 * Takes bytes as a program for kernel/map.c, runs it, and compares the map with
 * a plain array of states. A libFuzzer target; map_test.c feeds it random bytes.
 */
#include <stdio.h>

#include "../kernel/map.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MAX_LEAVES	4
#define MAX_BLOCKS	(MAX_LEAVES * NBDCOW_LEAF_BLOCKS)

/* What a slot of the table must hold. */
enum kind { EMPTY, LEAF, ALL_ZERO };

static struct {
	const u8 *data, *end;	/* the rest of the program */
	struct nbdcow_map *map;
	u64 nr_blocks;
	u64 last;		/* block of the last operation */
	long zeroed, leaves;
	u8 state[MAX_BLOCKS];
	u8 kind[MAX_LEAVES];
} fuzz;

#define expect(what) do { \
	if (!(what)) { \
		fprintf(stderr, "%s:%d: not true: %s (%zu bytes before the end)\n", \
			__FILE__, __LINE__, #what, (size_t)(fuzz.end - fuzz.data)); \
		abort(); \
	} \
} while (0)

static unsigned int next_byte(void)
{
	return fuzz.data < fuzz.end ? *fuzz.data++ : 0;
}

static u64 next_number(u64 below)
{
	u64 number = next_byte();

	number |= next_byte() << 8;
	number |= next_byte() << 16;
	return number % below;
}

/* Mostly where it is interesting: at the edges of words and leaves. */
static u64 next_block(void)
{
	unsigned int how = next_byte();
	u64 block, near = (how >> 3) % 8;

	switch (how % 8) {
	case 0:
		block = fuzz.last + near;
		break;
	case 1:
		block = fuzz.last + NBDCOW_WORD_BLOCKS - near;
		break;
	case 2:
	case 3:
		block = next_byte() % MAX_LEAVES * NBDCOW_LEAF_BLOCKS + near;
		break;
	case 4:
		block = next_byte() % MAX_LEAVES * NBDCOW_LEAF_BLOCKS - near;
		break;
	case 5:
		block = next_number(MAX_BLOCKS) / NBDCOW_WORD_BLOCKS *
			NBDCOW_WORD_BLOCKS + near;
		break;
	default:
		block = next_number(MAX_BLOCKS);
	}
	fuzz.last = block % fuzz.nr_blocks;
	return fuzz.last;
}

static u64 next_count(u64 most)
{
	unsigned int how = next_byte();
	u64 count;

	switch (how % 4) {
	case 0:
		count = 1 + how / 4;
		break;
	case 1:
		count = how / 4 * NBDCOW_WORD_BLOCKS;
		break;
	case 2:
		count = how / 4 * NBDCOW_LEAF_BLOCKS;
		break;
	default:
		count = next_number(MAX_BLOCKS) >> how / 4 % 16;
	}
	return count < 1 ? 1 : count > most ? most : count;
}

static void check_counters(void)
{
	const struct nbdcow_map *map = fuzz.map;

	expect(atomic_long_read(&map->zeroed) == fuzz.zeroed);
	expect(atomic_long_read(&map->nr_leaves) == fuzz.leaves);
	expect(shim_objects >= fuzz.leaves);
	expect(nbdcow_map_bytes(map) == sizeof(*map) +
	       DIV_ROUND_UP_ULL(fuzz.nr_blocks, NBDCOW_LEAF_BLOCKS) *
	       sizeof(void *) + fuzz.leaves * sizeof(struct nbdcow_leaf));
	expect(!shim_warnings);
}

static u64 shadow_run(u64 block, u64 max)
{
	u64 want = nbdcow_leaf_span(block, max), run = 1;

	while (run < want && fuzz.state[block + run] == fuzz.state[block])
		run++;
	return run;
}

static void check_run(u64 block, u64 max)
{
	u64 run = 0;

	expect(nbdcow_map_run(fuzz.map, block, max, &run) == fuzz.state[block]);
	expect(run == shadow_run(block, max));
}

static void check_everything(void)
{
	u64 block, run, left;
	unsigned long i;

	check_counters();
	for (block = 0; block < fuzz.nr_blocks; block += run) {
		left = fuzz.nr_blocks - block;
		check_run(block, left);
		run = shadow_run(block, left);
		if (run > 1)
			check_run(block + run - 1, left - run + 1);
	}

	for (i = 0; i < fuzz.map->nr_slots; i++) {
		const struct nbdcow_leaf *leaf = fuzz.map->leaves[i];
		long stored = 0, zeroed = 0;

		if (fuzz.kind[i] != LEAF) {
			expect((unsigned long)leaf == (fuzz.kind[i] == ALL_ZERO));
			continue;
		}
		for (block = i * NBDCOW_LEAF_BLOCKS;
		     block < (i + 1) * NBDCOW_LEAF_BLOCKS; block++) {
			stored += fuzz.state[block] == NBDCOW_OVERLAY;
			zeroed += fuzz.state[block] == NBDCOW_ZERO;
		}
		expect(atomic_read(&leaf->stored) == stored);
		expect(atomic_read(&leaf->zeroed) == zeroed);
	}
}

/* Returns false if there was no memory. */
static bool prepare(u64 block)
{
	u8 *kind = &fuzz.kind[nbdcow_leaf_index(block)];
	bool fails = *kind != LEAF && shim_fail_alloc == 1;
	int ret = nbdcow_map_prepare(fuzz.map, block, GFP_NOIO);

	expect(ret == (fails ? -ENOMEM : 0));
	if (!ret && *kind != LEAF) {
		*kind = LEAF;
		fuzz.leaves++;
	}
	return !ret;
}

static u64 shadow_set(u64 block, u64 count, enum nbdcow_state to)
{
	u64 stored = 0;

	for (; count; block++, count--) {
		stored += fuzz.state[block] == NBDCOW_OVERLAY;
		fuzz.zeroed += (to == NBDCOW_ZERO) -
			       (fuzz.state[block] == NBDCOW_ZERO);
		fuzz.state[block] = to;
	}
	return stored;
}

/* As many blocks as are not stored yet, at least one. */
static void install(u64 block, u64 count)
{
	u64 n;

	if (fuzz.state[block] == NBDCOW_OVERLAY || !prepare(block))
		return;
	count = nbdcow_leaf_span(block, count);
	for (n = 1; n < count; n++)
		if (fuzz.state[block + n] == NBDCOW_OVERLAY)
			break;
	expect(nbdcow_map_change(fuzz.map, block, n, NBDCOW_OVERLAY) == 0);
	shadow_set(block, n, NBDCOW_OVERLAY);
}

static bool all_zero(const u8 *state, u64 count)
{
	while (count && *state == NBDCOW_ZERO) {
		state++;
		count--;
	}
	return !count;
}

static void zero(u64 block, u64 count)
{
	while (count) {
		u64 n = nbdcow_leaf_span(block, count), stored, was;
		u64 slot = nbdcow_leaf_index(block);

		if (n == NBDCOW_LEAF_BLOCKS)
			stored = nbdcow_map_zero_leaf(fuzz.map, block);
		else if (prepare(block))
			stored = nbdcow_map_change(fuzz.map, block, n, NBDCOW_ZERO);
		else
			return;
		was = shadow_set(block, n, NBDCOW_ZERO);
		expect(stored == was);
		if (all_zero(&fuzz.state[slot * NBDCOW_LEAF_BLOCKS],
			     NBDCOW_LEAF_BLOCKS)) {
			fuzz.leaves -= fuzz.kind[slot] == LEAF;
			fuzz.kind[slot] = ALL_ZERO;
		}
		block += n;
		count -= n;
	}
}

static void check_uniform(u64 block, u64 count, enum nbdcow_state state)
{
	bool uniform = true;
	u64 i;

	for (i = 0; i < count && uniform; i++)
		uniform = fuzz.state[block + i] == state;
	expect(nbdcow_map_is_uniform(fuzz.map, block, count, state) == uniform);
}

static void grow(u64 by)
{
	bool fails = shim_fail_alloc == 1;
	struct nbdcow_map *new = nbdcow_map_create(fuzz.nr_blocks + by, GFP_KERNEL);

	expect(!new == fails);
	if (!new)
		return;
	nbdcow_map_take_over(new, fuzz.map);
	kvfree(fuzz.map);
	fuzz.map = new;
	fuzz.nr_blocks += by;
}

static void step(void)
{
	unsigned int op = next_byte();
	u64 block = next_block(), count = next_count(fuzz.nr_blocks - block);

	switch (op % 16) {
	case 0:
	case 1:
		install(block, 1);
		break;
	case 2:
	case 3:
	case 4:
		install(block, count);
		break;
	case 5:
	case 6:
	case 7:
		zero(block, count);
		break;
	case 8:
		block -= block % NBDCOW_LEAF_BLOCKS;
		zero(block, nbdcow_leaf_span(block, fuzz.nr_blocks - block));
		break;
	case 9:
		prepare(block);
		break;
	case 10:
	case 11:
	case 12:
		check_run(block, count);
		break;
	case 13:
		check_uniform(block, count, op / 16 % 3);
		break;
	case 14:
		shim_fail_alloc = 1 + op / 16 % 4;
		break;
	default:
		grow(next_number(MAX_BLOCKS - fuzz.nr_blocks + 1));
	}
	check_counters();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	memset(&fuzz, 0, sizeof(fuzz));
	fuzz.data = data;
	fuzz.end = data + size;
	shim_fail_alloc = 0;
	shim_warnings = 0;

	/* as many small devices as large ones */
	fuzz.nr_blocks = 1 + (next_number(MAX_BLOCKS) >> next_byte() % 18);
	expect(!nbdcow_map_init());
	fuzz.map = nbdcow_map_create(fuzz.nr_blocks, GFP_KERNEL);
	expect(fuzz.map);
	while (fuzz.data < fuzz.end)
		step();
	shim_fail_alloc = 0;
	check_everything();

	nbdcow_map_destroy(fuzz.map);
	nbdcow_map_exit();
	expect(!shim_objects && !shim_warnings);
	return 0;
}

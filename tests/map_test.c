// SPDX-License-Identifier: GPL-2.0-only
/*
 * Blocks would be read from the wrong place, the accounting be wrong, or memory
 * be lost: kernel/map.c, as it is, tested in user space.
 *
 * usage: map_test [single|threads] [SEED]
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <time.h>

#include "../kernel/map.h"

#define LEAF	NBDCOW_LEAF_BLOCKS
#define WORD	((u64)NBDCOW_WORD_BLOCKS)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static unsigned int tests, failures, complaints;
static u64 seed;

/* Says once a test what is wrong; true if all is well. */
static bool __attribute__((format(printf, 2, 3)))
check(bool good, const char *format, ...)
{
	va_list args;

	if (good || __atomic_fetch_add(&complaints, 1, __ATOMIC_RELAXED))
		return good;
	va_start(args, format);
	printf("# ");
	vprintf(format, args);
	printf("\n");
	va_end(args);
	return false;
}

/* xorshift64 */
static u64 random_number(u64 *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static struct nbdcow_map *new_map(u64 nr_blocks)
{
	struct nbdcow_map *map = nbdcow_map_create(nr_blocks, GFP_KERNEL);

	if (!map) {
		printf("Bail out! no memory for a map\n");
		exit(1);
	}
	return map;
}

/* The caller knows the leaf exists, or that it can be had. */
static u64 set(struct nbdcow_map *map, u64 block, u64 count,
	       enum nbdcow_state to)
{
	if (!count)
		return 0;
	check(!nbdcow_map_prepare(map, block, GFP_NOIO), "cannot prepare");
	return nbdcow_map_change(map, block, count, to);
}

static void check_run(const struct nbdcow_map *map, u64 block, u64 max,
		      enum nbdcow_state state, u64 run)
{
	u64 got_run = 0;
	enum nbdcow_state got = nbdcow_map_run(map, block, max, &got_run);

	check(got == state && got_run == run,
	      "block %llu, at most %llu: state %d for %llu, not %d for %llu",
	      block, max, got, got_run, state, run);
}

/*
 * All patterns of PATTERN blocks, wherever they can lie relative to the edges of
 * words, and all look-ups inside.
 */
#define PATTERN	6U

static void check_pattern(u64 first, const u8 *states, enum nbdcow_state around)
{
	struct nbdcow_map *map = new_map(3 * LEAF);
	unsigned int i, max, run;

	if (around != NBDCOW_BASE) {
		set(map, LEAF, first - LEAF, around);
		set(map, first + PATTERN, 2 * LEAF - first - PATTERN, around);
	}
	for (i = 0; i < PATTERN; i++)
		if (states[i] != NBDCOW_BASE)
			set(map, first + i, 1, states[i]);

	for (i = 0; i < PATTERN; i++) {
		for (run = 1; i + run < PATTERN; run++)
			if (states[i + run] != states[i])
				break;
		for (max = 1; i + max <= PATTERN; max++)
			check_run(map, first + i, max, states[i], min(run, max));
		if (i + run < PATTERN || states[i] != around)
			check_run(map, first + i, 2 * LEAF, states[i], run);
		else
			check_run(map, first + i, 2 * LEAF, states[i],
				  2 * LEAF - first - i);
	}
	nbdcow_map_destroy(map);
}

static void test_patterns(void)
{
	/* in the middle leaf, so that there are neighbours on both sides */
	u64 firsts[2 + PATTERN] = { LEAF, 2 * LEAF - PATTERN };
	unsigned int around, code, rest, i, j;
	u8 states[PATTERN];

	for (i = 0; i < PATTERN; i++)
		firsts[2 + i] = LEAF + 5 * WORD - i;

	for (code = 0; code < 3 * 3 * 3 * 3 * 3 * 3; code++) {
		for (i = 0, rest = code; i < PATTERN; i++, rest /= 3)
			states[i] = rest % 3;
		for (around = 0; around < 3; around++)
			for (j = 0; j < 2 + PATTERN; j++)
				check_pattern(firsts[j], states, around);
	}
	rcu_barrier();
}

/*
 * A leaf cut into SEGMENTS pieces, edges in and beside words: every change in
 * every state that the map can be in.
 */
#define SEGMENTS 5
#define NO_LEAF	(3 * 3 * 3 * 3 * 3)	/* a code: no leaf, all BASE */
#define CODES	(NO_LEAF + 1)

static const u64 edges[SEGMENTS + 1] = { 0, 1, WORD, WORD + 1, 3 * WORD - 1, LEAF };

static void decode(unsigned int code, u8 *states)
{
	unsigned int i;

	for (i = 0; i < SEGMENTS; i++, code /= 3)
		states[i] = code == NO_LEAF ? NBDCOW_BASE : code % 3;
	if (code >= CODES)
		abort();
}

static void check_segments(const struct nbdcow_map *map, const u8 *states)
{
	const struct nbdcow_leaf *leaf = map->leaves[1];
	long stored = 0, zeroed = 0;
	unsigned int i, j;
	u64 run;

	for (i = 0; i < SEGMENTS; i++) {
		u64 blocks = edges[i + 1] - edges[i];

		stored += states[i] == NBDCOW_OVERLAY ? blocks : 0;
		zeroed += states[i] == NBDCOW_ZERO ? blocks : 0;
		for (j = i + 1; j < SEGMENTS; j++)
			if (states[j] != states[i])
				break;
		check_run(map, LEAF + edges[i], 2 * LEAF, states[i],
			  edges[j] - edges[i]);
		check_run(map, LEAF + edges[i + 1] - 1, 2 * LEAF, states[i],
			  edges[j] - edges[i + 1] + 1);
		for (j = NBDCOW_BASE; j <= NBDCOW_ZERO; j++)
			check(nbdcow_map_is_uniform(map, LEAF + edges[i], blocks, j) ==
			      (states[i] == j), "segment %u is uniform or not", i);
	}
	/* neighbours */
	check_run(map, 0, LEAF, NBDCOW_BASE, LEAF);
	check_run(map, 2 * LEAF, LEAF, NBDCOW_BASE, LEAF);
	check(nbdcow_map_is_uniform(map, 0, 3 * LEAF, NBDCOW_BASE) ==
	      (stored == 0 && zeroed == 0), "the whole map is BASE or not");

	run = atomic_long_read(&map->nr_leaves);
	check(atomic_long_read(&map->zeroed) == zeroed, "%ld blocks ZERO, not %ld",
	      atomic_long_read(&map->zeroed), zeroed);
	if (zeroed == (long)LEAF || !leaf) {
		check(run == 0, "a leaf that is %s is counted", leaf ? "ZERO" : "BASE");
		check((unsigned long)leaf <= 1, "a leaf that is all ZERO stays");
		check(zeroed || stored == 0, "the leaf is missing");
		return;
	}
	check(run == 1, "%llu leaves", run);
	check(atomic_read(&leaf->stored) == stored, "leaf: %d stored, not %ld",
	      atomic_read(&leaf->stored), stored);
	check(atomic_read(&leaf->zeroed) == zeroed, "leaf: %d zeroed, not %ld",
	      atomic_read(&leaf->zeroed), zeroed);
}

static void check_change(unsigned int code, unsigned int from, unsigned int to,
			 enum nbdcow_state state)
{
	struct nbdcow_map *map = new_map(3 * LEAF);
	u64 stored = 0, got, blocks;
	u8 states[SEGMENTS];
	unsigned int i;

	decode(code, states);
	for (i = 0; i < SEGMENTS; i++)
		if (states[i] != NBDCOW_BASE)
			set(map, LEAF + edges[i], edges[i + 1] - edges[i], states[i]);
	if (code == 0)
		check(!nbdcow_map_prepare(map, LEAF, GFP_NOIO), "cannot prepare");
	check_segments(map, states);

	for (i = from; i < to; i++) {
		if (states[i] == NBDCOW_OVERLAY)
			stored += edges[i + 1] - edges[i];
		states[i] = state;
	}
	/* an OVERLAY block is never installed again */
	if (state == NBDCOW_ZERO || !stored) {
		blocks = edges[to] - edges[from];
		if (blocks == LEAF && state == NBDCOW_ZERO && code % 2)
			got = nbdcow_map_zero_leaf(map, LEAF);
		else
			got = set(map, LEAF + edges[from], blocks, state);
		check(got == stored, "%llu were stored, not %llu", got, stored);
		check_segments(map, states);
	}
	nbdcow_map_destroy(map);
}

static void test_changes(void)
{
	unsigned int code, from, to;

	for (code = 0; code < CODES; code++)
		for (from = 0; from < SEGMENTS; from++)
			for (to = from + 1; to <= SEGMENTS; to++) {
				check_change(code, from, to, NBDCOW_OVERLAY);
				check_change(code, from, to, NBDCOW_ZERO);
			}
	rcu_barrier();
}

/* Random programs for the interpreter of fuzz_map.c, which ends the run if wrong. */
static void test_random(void)
{
	u64 state = seed;
	unsigned int i, j, size;
	u8 program[1200];

	nbdcow_map_exit();	/* the programs do it all themselves */
	for (i = 0; i < 300; i++) {
		size = random_number(&state) % sizeof(program);
		for (j = 0; j < size; j++)
			program[j] = random_number(&state) >> 32;
		LLVMFuzzerTestOneInput(program, size);
	}
	check(!nbdcow_map_init(), "cannot begin again");
}

static void test_sizes(void)
{
	static const u64 sizes[] = { 1, 2, WORD, LEAF - 1, LEAF, LEAF + 1,
				     3 * LEAF, (1ULL << 32) + 1 };
	struct timespec begin, end;
	struct nbdcow_map *map;
	unsigned int i;
	long ms;

	for (i = 0; i < ARRAY_SIZE(sizes); i++) {
		u64 last = sizes[i] - 1;

		map = new_map(sizes[i]);
		check_run(map, last, 1, NBDCOW_BASE, 1);
		set(map, last, 1, NBDCOW_OVERLAY);
		check_run(map, last, 1, NBDCOW_OVERLAY, 1);
		if (last) {
			set(map, 0, 1, NBDCOW_ZERO);
			check_run(map, 0, 1, NBDCOW_ZERO, 1);
		}
		check_run(map, last, 1, NBDCOW_OVERLAY, 1);
		check(atomic_long_read(&map->nr_leaves) == 1 + (last >= LEAF),
		      "size %llu: leaves", sizes[i]);
		nbdcow_map_destroy(map);
	}

	clock_gettime(CLOCK_MONOTONIC, &begin);
	map = new_map(1ULL << 32);
	clock_gettime(CLOCK_MONOTONIC, &end);
	ms = (end.tv_sec - begin.tv_sec) * 1000 +
	     (end.tv_nsec - begin.tv_nsec) / 1000000;
	check(nbdcow_map_bytes(map) <= 4 << 20, "a fresh 16 TiB map takes %zu bytes",
	      nbdcow_map_bytes(map));
	check(ms < 500, "a 16 TiB map takes %ld ms to make", ms);
	nbdcow_map_destroy(map);

	/* the most that a sector_t can say: too much memory, not a small table */
	check(!nbdcow_map_create(1ULL << 61, GFP_KERNEL), "a map of 2^61 blocks was made");
}

/* Discarding all of a device takes no more memory than a fresh map. */
static void test_zero_leaf(void)
{
	struct nbdcow_map *map = new_map(4 * LEAF);
	size_t fresh = nbdcow_map_bytes(map);
	u64 stored = 0;
	unsigned int i;

	set(map, 0, 3, NBDCOW_OVERLAY);
	set(map, LEAF, LEAF, NBDCOW_OVERLAY);
	set(map, 2 * LEAF + 7, 1, NBDCOW_ZERO);

	shim_fail_alloc = 1;
	for (i = 0; i < 4; i++)
		stored += nbdcow_map_zero_leaf(map, i * LEAF + 9);
	check(shim_fail_alloc == 1, "a whole leaf needed memory");
	shim_fail_alloc = 0;

	check(stored == 3 + LEAF, "%llu were stored", stored);
	check(nbdcow_map_bytes(map) == fresh, "leaves are still counted");
	check(nbdcow_map_is_uniform(map, 0, 4 * LEAF, NBDCOW_ZERO), "not all ZERO");
	check(atomic_long_read(&map->zeroed) == 4 * LEAF, "zeroed is wrong");

	/* one block of it written again: the others stay ZERO */
	check(set(map, LEAF + 100, 1, NBDCOW_OVERLAY) == 0, "was not stored");
	check_run(map, LEAF, LEAF, NBDCOW_ZERO, 100);
	check_run(map, LEAF + 100, LEAF, NBDCOW_OVERLAY, 1);
	check_run(map, LEAF + 101, LEAF, NBDCOW_ZERO, LEAF - 101);
	check(atomic_long_read(&map->zeroed) == 4 * LEAF - 1, "zeroed is wrong");
	check(set(map, LEAF + 100, 1, NBDCOW_ZERO) == 1, "was stored");
	check(nbdcow_map_bytes(map) == fresh, "the leaf did not go");
	nbdcow_map_destroy(map);

	check(shim_objects, "leaves were freed before a grace period");
	rcu_barrier();
	check(!shim_objects, "%ld leaves are left", shim_objects);
}

/* A larger map takes over what the old one says, and the old one goes. */
static void test_take_over(void)
{
	struct nbdcow_map *old = new_map(2 * LEAF + 5), *new;

	set(old, 3, 4, NBDCOW_OVERLAY);
	nbdcow_map_zero_leaf(old, LEAF);
	set(old, 2 * LEAF + 4, 1, NBDCOW_OVERLAY);
	new = new_map(4 * LEAF);
	nbdcow_map_take_over(new, old);
	kvfree(old);

	check_run(new, 0, LEAF, NBDCOW_BASE, 3);
	check_run(new, 3, LEAF, NBDCOW_OVERLAY, 4);
	check_run(new, LEAF, LEAF, NBDCOW_ZERO, LEAF);
	check_run(new, 2 * LEAF, LEAF, NBDCOW_BASE, 4);
	check_run(new, 2 * LEAF + 4, LEAF, NBDCOW_OVERLAY, 1);
	check_run(new, 2 * LEAF + 5, LEAF, NBDCOW_BASE, LEAF - 5);
	check_run(new, 3 * LEAF, LEAF, NBDCOW_BASE, LEAF);
	check(atomic_long_read(&new->nr_leaves) == 2, "leaves are miscounted");
	check(atomic_long_read(&new->zeroed) == LEAF, "zeroed is miscounted");
	nbdcow_map_destroy(new);
	check(!shim_objects, "%ld leaves are left", shim_objects);
}

static void check_same(const struct nbdcow_map *copy, const struct nbdcow_map *map)
{
	u64 block, run, copied;

	for (block = 0; block < map->nr_blocks; block += run) {
		enum nbdcow_state state = nbdcow_map_run(map, block,
							 map->nr_blocks - block, &run);

		check(nbdcow_map_run(copy, block, map->nr_blocks - block, &copied) ==
		      state && copied == run, "block %llu differs", block);
	}
	check(atomic_long_read(&copy->nr_leaves) == atomic_long_read(&map->nr_leaves),
	      "leaves are miscounted");
	check(atomic_long_read(&copy->zeroed) == atomic_long_read(&map->zeroed),
	      "zeroed is miscounted");
}

/* Also a second time, over a copy that became old or was cut short. */
static void test_copy(void)
{
	struct nbdcow_map *map = new_map(4 * LEAF + 5), *copy = new_map(4 * LEAF + 5);

	set(map, 3, 4, NBDCOW_OVERLAY);
	nbdcow_map_zero_leaf(map, LEAF);
	set(map, 2 * LEAF + 7, 90, NBDCOW_ZERO);
	set(map, 4 * LEAF + 4, 1, NBDCOW_OVERLAY);
	shim_fail_alloc = 3;
	check(nbdcow_map_copy(copy, map, GFP_NOIO) == -ENOMEM, "it did not fail");
	shim_fail_alloc = 0;
	check(!nbdcow_map_copy(copy, map, GFP_NOIO), "it failed");
	check_same(copy, map);

	nbdcow_map_zero_leaf(map, 0);
	set(map, LEAF + 1, 1, NBDCOW_OVERLAY);
	set(map, 2 * LEAF + 9, 1, NBDCOW_OVERLAY);
	check_run(copy, 3, LEAF, NBDCOW_OVERLAY, 4);
	check_run(copy, 2 * LEAF + 7, LEAF, NBDCOW_ZERO, 90);
	check(!nbdcow_map_copy(copy, map, GFP_NOIO), "it failed");
	check_same(copy, map);
	nbdcow_map_destroy(copy);
	nbdcow_map_destroy(map);
	rcu_barrier();
	check(!shim_objects, "%ld leaves are left", shim_objects);
}

/* The n-th allocation fails, for each n until nothing fails any more. */
static void test_no_memory(void)
{
	struct nbdcow_map *map;
	unsigned int n;
	bool failed;
	u64 i;

	nbdcow_map_exit();
	for (n = 1, failed = true; failed; n++) {
		shim_fail_alloc = n;
		failed = true;
		if (nbdcow_map_init())
			continue;
		map = nbdcow_map_create(3 * LEAF, GFP_KERNEL);
		failed = !map;
		for (i = 0; i < 3 && map; i++) {
			u64 leaves = atomic_long_read(&map->nr_leaves);
			int ret = nbdcow_map_prepare(map, i * LEAF, GFP_NOIO);

			check(!ret || ret == -ENOMEM, "prepare returned %d", ret);
			check((u64)atomic_long_read(&map->nr_leaves) == leaves + !ret,
			      "leaves are miscounted");
			check_run(map, i * LEAF, LEAF, NBDCOW_BASE, LEAF);
			failed |= ret;
		}
		nbdcow_map_destroy(map);
		check(!shim_objects, "%ld leaves are left", shim_objects);
		nbdcow_map_exit();
	}
	/* the cache, the table and three leaves; then a run without failure */
	check(n - 1 == 5 + 1, "%u allocations, not 5", n - 2);
	shim_fail_alloc = 0;
	check(!nbdcow_map_init(), "cannot begin again");
}

/* What the contract forbids is refused, not carried out. */
static void test_misuse(void)
{
	struct nbdcow_map *map = new_map(2 * LEAF);

	check(nbdcow_map_change(map, 0, 1, NBDCOW_OVERLAY) == 0, "no leaf");
	check(shim_warnings == 1, "no warning about a missing leaf");
	set(map, LEAF - 1, 1, NBDCOW_OVERLAY);
	nbdcow_map_change(map, LEAF - 1, 2, NBDCOW_ZERO);
	check(shim_warnings == 2, "no warning about leaving the leaf");
	nbdcow_map_change(map, LEAF - 1, 1, NBDCOW_BASE);
	check(shim_warnings == 3, "no warning about a change to BASE");
	check_run(map, LEAF - 1, 1, NBDCOW_OVERLAY, 1);
	nbdcow_map_zero_leaf(map, 0);
	nbdcow_map_change(map, 5, 1, NBDCOW_OVERLAY);
	check(shim_warnings == 4, "no warning about a leaf that is all ZERO");
	check_run(map, 0, LEAF, NBDCOW_ZERO, LEAF);
	nbdcow_map_destroy(map);
	rcu_barrier();
	shim_warnings = 0;
}

/*
 * Threads. What stands for the data of a block is a plain variable that its
 * installer writes before it publishes the block and that readers look at when
 * they are told OVERLAY: the thread sanitizer sees if nothing orders the two.
 */
#define THREAD_BLOCKS	(2 * LEAF)
#define THREADS		4U

static struct {
	struct nbdcow_map *map;
	u32 data[THREAD_BLOCKS];
	unsigned int publishing;	/* threads that are not yet done */
	pthread_rwlock_t shard;
	long used;			/* as the callers of the map count it */
} shared;

static void *publisher(void *arg)
{
	u64 block = (uintptr_t)arg;

	/* neighbours in one word belong to different publishers */
	for (; block < THREAD_BLOCKS; block += 2) {
		shared.data[block] = ~(u32)block;
		check(!nbdcow_map_prepare(shared.map, block, GFP_NOIO), "prepare");
		check(nbdcow_map_change(shared.map, block, 1, NBDCOW_OVERLAY) == 0,
		      "block %llu was published twice", block);
	}
	SHIM_ADD(-1, &shared.publishing);
	return NULL;
}

static void *reader(void *arg)
{
	u64 random = seed + 1 + (uintptr_t)arg, block, run, i;
	enum nbdcow_state state;

	while (SHIM_LOAD(&shared.publishing)) {
		block = random_number(&random) % THREAD_BLOCKS;
		state = nbdcow_map_run(shared.map, block, THREAD_BLOCKS - block, &run);
		check(state == NBDCOW_BASE || state == NBDCOW_OVERLAY,
		      "block %llu has state %d", block, state);
		for (i = 0; i < min(run, 50ULL) && state == NBDCOW_OVERLAY; i++)
			check(shared.data[block + i] == ~(u32)(block + i),
			      "block %llu is OVERLAY without data", block + i);
	}
	return NULL;
}

static void run_threads(void *(*first)(void *), void *(*second)(void *))
{
	pthread_t threads[THREADS];
	uintptr_t i;

	shared.publishing = THREADS / 2;
	for (i = 0; i < THREADS; i++)
		if (pthread_create(&threads[i], NULL, i < THREADS / 2 ? first : second,
				   (void *)i)) {
			printf("Bail out! no more threads\n");
			exit(1);
		}
	for (i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
}

static void test_publishers(void)
{
	u64 run, i;

	shared.map = new_map(THREAD_BLOCKS);
	run_threads(publisher, reader);
	for (i = 0; i < THREAD_BLOCKS; i += LEAF) {
		check_run(shared.map, i, LEAF, NBDCOW_OVERLAY, LEAF);
		check(atomic_read(&shared.map->leaves[i / LEAF]->stored) == LEAF,
		      "leaf %llu: stored is miscounted", i / LEAF);
	}
	check(atomic_long_read(&shared.map->nr_leaves) == 2, "leaves are miscounted");
	nbdcow_map_run(shared.map, 0, 1, &run);
	nbdcow_map_destroy(shared.map);
	check(!shim_objects, "%ld leaves are left", shim_objects);
}

/* Blocks of two leaves come and go, as the shard lock allows. */
static void *changer(void *arg)
{
	u64 random = seed + 17 + (uintptr_t)arg, run;
	unsigned int round;

	for (round = 0; round < 6000; round++) {
		u64 block = random_number(&random) % THREAD_BLOCKS;
		u64 count = random_number(&random) % 3 ? 1 + block % 70 : LEAF;
		long stored;

		if (random_number(&random) % 3) {
			/* two of them never install one block at once */
			block = block / THREADS * THREADS + (uintptr_t)arg;
			pthread_rwlock_rdlock(&shared.shard);
			if (nbdcow_map_run(shared.map, block, 1, &run) !=
			    NBDCOW_OVERLAY) {
				SHIM_ADD(1, &shared.used);
				check(!nbdcow_map_prepare(shared.map, block, GFP_NOIO),
				      "prepare");
				nbdcow_map_change(shared.map, block, 1, NBDCOW_OVERLAY);
			}
			pthread_rwlock_unlock(&shared.shard);
			continue;
		}
		pthread_rwlock_wrlock(&shared.shard);
		if (count == LEAF) {
			stored = nbdcow_map_zero_leaf(shared.map, block);
		} else {
			count = nbdcow_leaf_span(block, count);
			stored = set(shared.map, block, count, NBDCOW_ZERO);
		}
		SHIM_ADD(-stored, &shared.used);
		pthread_rwlock_unlock(&shared.shard);
	}
	SHIM_ADD(-1, &shared.publishing);
	return NULL;
}

static void *watcher(void *arg)
{
	u64 random = seed + 99 + (uintptr_t)arg, block, max, run;
	enum nbdcow_state state;

	while (SHIM_LOAD(&shared.publishing)) {
		block = random_number(&random) % THREAD_BLOCKS;
		max = 1 + random_number(&random) % 100;
		state = nbdcow_map_run(shared.map, block, max, &run);
		check(state <= NBDCOW_ZERO, "block %llu has state %d", block, state);
		check(run >= 1 && run <= nbdcow_leaf_span(block, max),
		      "block %llu, at most %llu: run of %llu", block, max, run);
	}
	return NULL;
}

static void test_changers(void)
{
	long stored = 0, zeroed = 0;
	u64 block, run;

	shared.map = new_map(THREAD_BLOCKS);
	shared.used = 0;
	pthread_rwlock_init(&shared.shard, NULL);
	run_threads(changer, watcher);
	for (block = 0; block < THREAD_BLOCKS; block += run)
		switch (nbdcow_map_run(shared.map, block, LEAF, &run)) {
		case NBDCOW_OVERLAY:
			stored += run;
			break;
		case NBDCOW_ZERO:
			zeroed += run;
			break;
		default:
			break;
		}
	check(stored == shared.used, "%ld blocks stored, %ld counted", stored,
	      shared.used);
	check(atomic_long_read(&shared.map->zeroed) == zeroed,
	      "%ld blocks ZERO, %ld counted", zeroed,
	      atomic_long_read(&shared.map->zeroed));
	nbdcow_map_destroy(shared.map);
	rcu_barrier();
	check(!shim_objects, "%ld leaves are left", shim_objects);
	pthread_rwlock_destroy(&shared.shard);
}

static void run_test(void (*test)(void), const char *title)
{
	complaints = 0;
	test();
	check(!shim_warnings, "%u warnings", shim_warnings);
	failures += complaints != 0;
	printf("%sok %u %s\n", complaints ? "not " : "", ++tests, title);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	const char *which = argc > 1 ? argv[1] : "";

	seed = argc > 2 ? strtoull(argv[2], NULL, 0) : (u64)time(NULL);
	seed += !seed;
	printf("# seed %llu\n", seed);
	if (nbdcow_map_init())
		return 1;
	if (strcmp(which, "threads")) {
		run_test(test_patterns, "runs: every pattern at every edge of words");
		run_test(test_changes, "changes: each from every state of a leaf");
		run_test(test_zero_leaf, "a leaf that is all ZERO costs nothing");
		run_test(test_take_over, "a larger map takes over");
		run_test(test_copy, "a copy of a map");
		run_test(test_sizes, "sizes from one block to 16 TiB and too many");
		run_test(test_no_memory, "each allocation fails");
		run_test(test_misuse, "illegal changes are refused");
		run_test(test_random, "random programs against a plain array");
	}
	if (strcmp(which, "single")) {
		run_test(test_publishers, "lockless look-ups beside publishers");
		run_test(test_changers, "lockless look-ups beside installs and discards");
	}
	nbdcow_map_exit();
	printf("1..%u\n", tests);
	return failures != 0;
}

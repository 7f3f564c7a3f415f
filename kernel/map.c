// SPDX-License-Identifier: GPL-2.0-only
/*
 * Block-state map: a flat table of pointers to leaves, two bits a block.
 * The table costs 8 bytes per 64 MiB of device, 2 MiB for 16 TiB; leaves come
 * with the first change in their range and go when all of it is ZERO.
 */
#include <linux/bitops.h>
#include <linux/bug.h>
#include <linux/errno.h>
#include <linux/kernel.h>
#include <linux/mm.h>
#include <linux/overflow.h>
#include <linux/slab.h>

#include "map.h"

static struct kmem_cache *leaf_cache;

/**
 * nbdcow_map_init() - prepare the allocator of leaves
 *
 * Context: process context, module load.
 * Return: 0 or -ENOMEM.
 */
int nbdcow_map_init(void)
{
	leaf_cache = kmem_cache_create("nbdcow_leaf", sizeof(struct nbdcow_leaf),
				       0, 0, NULL);
	return leaf_cache ? 0 : -ENOMEM;
}

/**
 * nbdcow_map_exit() - wait for the last leaves to be freed, drop the allocator
 *
 * Context: process context, module unload; every map is destroyed.
 */
void nbdcow_map_exit(void)
{
	rcu_barrier();
	kmem_cache_destroy(leaf_cache);
}

static bool is_leaf(const struct nbdcow_leaf *leaf)
{
	return leaf && leaf != NBDCOW_ZERO_LEAF;
}

/* All blocks of a word in @state. */
static unsigned long word_of(enum nbdcow_state state)
{
	return state * (~0UL / NBDCOW_STATE_MASK);
}

static void leaf_free_rcu(struct rcu_head *rcu)
{
	kmem_cache_free(leaf_cache, container_of(rcu, struct nbdcow_leaf, rcu));
}

/*
 * Callers hold the leaf's shard lock, maybe only for read: another installer
 * may add the leaf meanwhile.
 */
static struct nbdcow_leaf *leaf_get(const struct nbdcow_map *map, u64 block)
{
	return rcu_dereference_check(map->leaves[nbdcow_leaf_index(block)], 1);
}

/**
 * nbdcow_map_create() - make a map with all blocks in state BASE
 * @nr_blocks: size of the device in blocks
 * @gfp: how to allocate its table
 *
 * Context: process context, may sleep.
 * Return: the map or NULL when there is no memory for its table.
 */
struct nbdcow_map *nbdcow_map_create(u64 nr_blocks, gfp_t gfp)
{
	u64 slots = DIV_ROUND_UP_ULL(nr_blocks, NBDCOW_LEAF_BLOCKS);
	struct nbdcow_map *map;

	if (slots >= (INT_MAX - sizeof(*map)) / sizeof(map->leaves[0]))
		return NULL;
	map = kvzalloc(struct_size(map, leaves, slots),
		       gfp | __GFP_RETRY_MAYFAIL | __GFP_NOWARN);
	if (!map)
		return NULL;
	map->nr_blocks = nr_blocks;
	map->nr_slots = slots;
	return map;
}

/**
 * nbdcow_map_take_over() - give a map's leaves to a larger, fresh one
 * @new: the fresh map, at least as large
 * @old: the map to replace; nobody may change it during the call, and the
 *	caller frees it with kvfree() once no reader can see it
 *
 * Context: any.
 */
void nbdcow_map_take_over(struct nbdcow_map *new, struct nbdcow_map *old)
{
	unsigned long i;

	for (i = 0; i < old->nr_slots; i++)
		rcu_assign_pointer(new->leaves[i],
				   rcu_dereference_protected(old->leaves[i], 1));
	atomic_long_set(&new->nr_leaves, atomic_long_read(&old->nr_leaves));
	atomic_long_set(&new->zeroed, atomic_long_read(&old->zeroed));
}

/**
 * nbdcow_map_copy() - make a map say what another one says
 * @to: the map, which nobody uses yet
 * @from: the other one, of the same size; nobody may change it during the call
 * @gfp: how to allocate the leaves
 *
 * Context: process context; sleeps if @gfp may.
 * Return: 0, or -ENOMEM with a part copied, after which it can be called again.
 */
int nbdcow_map_copy(struct nbdcow_map *to, const struct nbdcow_map *from,
		    gfp_t gfp)
{
	unsigned long i;

	for (i = 0; i < from->nr_slots; i++) {
		struct nbdcow_leaf *leaf, *copy;

		leaf = rcu_dereference_protected(from->leaves[i], 1);
		copy = rcu_dereference_protected(to->leaves[i], 1);
		if (!is_leaf(leaf)) {
			if (is_leaf(copy)) {
				kmem_cache_free(leaf_cache, copy);
				atomic_long_dec(&to->nr_leaves);
			}
			RCU_INIT_POINTER(to->leaves[i], leaf);
			continue;
		}
		if (!is_leaf(copy)) {
			copy = kmem_cache_alloc(leaf_cache, gfp);
			if (!copy)
				return -ENOMEM;
			atomic_long_inc(&to->nr_leaves);
		}
		memcpy(copy, leaf, sizeof(*copy));
		RCU_INIT_POINTER(to->leaves[i], copy);
	}
	atomic_long_set(&to->zeroed, atomic_long_read(&from->zeroed));
	return 0;
}

/**
 * nbdcow_map_destroy() - free a map and its leaves
 * @map: the map, which no reader can see any more, or NULL
 *
 * Context: process context, may sleep.
 */
void nbdcow_map_destroy(struct nbdcow_map *map)
{
	unsigned long i;

	if (!map)
		return;
	for (i = 0; atomic_long_read(&map->nr_leaves) && i < map->nr_slots; i++) {
		struct nbdcow_leaf *leaf =
			rcu_dereference_protected(map->leaves[i], 1);

		if (is_leaf(leaf)) {
			kmem_cache_free(leaf_cache, leaf);
			atomic_long_dec(&map->nr_leaves);
		}
	}
	kvfree(map);
}

/**
 * nbdcow_map_bytes() - memory that a map takes, in bytes
 * @map: the map
 *
 * Context: any.
 * Return: table and leaves, without the allocator's own overhead.
 */
size_t nbdcow_map_bytes(const struct nbdcow_map *map)
{
	return struct_size(map, leaves, map->nr_slots) +
	       atomic_long_read(&map->nr_leaves) * sizeof(struct nbdcow_leaf);
}

/**
 * nbdcow_map_run() - the state of a block, and for how long it lasts
 * @map: the map
 * @block: first block, below the map's size
 * @max: most blocks that the caller cares for, at least 1
 * @run: set to how many blocks from @block on share its state: at least 1, at
 *	most @max, and never past the end of a leaf
 *
 * What the block's installer wrote before it published OVERLAY is visible to
 * a caller that is told OVERLAY.
 *
 * Context: any, under rcu_read_lock() or the shard lock of @block.
 * Return: the state.
 */
enum nbdcow_state nbdcow_map_run(const struct nbdcow_map *map, u64 block,
				 u64 max, u64 *run)
{
	const struct nbdcow_leaf *leaf =
		rcu_dereference_check(map->leaves[nbdcow_leaf_index(block)], 1);
	unsigned long i = block & (NBDCOW_LEAF_BLOCKS - 1);
	unsigned long want = nbdcow_leaf_span(block, max);
	unsigned long shift, word, diff, len;
	enum nbdcow_state state;

	if (!is_leaf(leaf)) {
		*run = want;
		return leaf ? NBDCOW_ZERO : NBDCOW_BASE;
	}

	shift = i % NBDCOW_WORD_BLOCKS;
	/* Pairs with the release in word_change(). */
	word = smp_load_acquire(&leaf->words[i / NBDCOW_WORD_BLOCKS]);
	word >>= shift * NBDCOW_STATE_BITS;
	state = word & NBDCOW_STATE_MASK;
	len = NBDCOW_WORD_BLOCKS - shift;
	diff = word ^ word_of(state);
	if (diff)
		len = min(len, __ffs(diff) / NBDCOW_STATE_BITS);

	/* The run reached the end of its word: go on by whole words. */
	for (i += len; len < want && i % NBDCOW_WORD_BLOCKS == 0;
	     i += NBDCOW_WORD_BLOCKS) {
		/* Pairs with the release in word_change(). */
		word = smp_load_acquire(&leaf->words[i / NBDCOW_WORD_BLOCKS]);
		diff = word ^ word_of(state);
		if (diff) {
			len += __ffs(diff) / NBDCOW_STATE_BITS;
			break;
		}
		len += NBDCOW_WORD_BLOCKS;
	}

	*run = min(len, want);
	return state;
}

/**
 * nbdcow_map_is_uniform() - are all blocks of a range in one state?
 * @map: the map
 * @block: first block
 * @count: number of blocks
 * @state: the state asked for
 *
 * Context: as for nbdcow_map_run().
 * Return: true if they are.
 */
bool nbdcow_map_is_uniform(const struct nbdcow_map *map, u64 block, u64 count,
			   enum nbdcow_state state)
{
	u64 run;

	for (; count; block += run, count -= run)
		if (nbdcow_map_run(map, block, count, &run) != state)
			return false;
	return true;
}

/**
 * nbdcow_map_prepare() - make sure that a block's leaf exists
 * @map: the map
 * @block: the block
 * @gfp: how to allocate the leaf
 *
 * After this nbdcow_map_change() of blocks in that leaf cannot fail.
 *
 * Context: under the block's shard lock; sleeps if @gfp may.
 * Return: 0 or -ENOMEM.
 */
int nbdcow_map_prepare(struct nbdcow_map *map, u64 block, gfp_t gfp)
{
	struct nbdcow_leaf __rcu **slot = &map->leaves[nbdcow_leaf_index(block)];
	struct nbdcow_leaf *old = leaf_get(map, block), *leaf, *seen;
	unsigned long i;

	if (is_leaf(old))
		return 0;

	leaf = kmem_cache_alloc(leaf_cache, gfp);
	if (!leaf)
		return -ENOMEM;
	for (i = 0; i < NBDCOW_LEAF_WORDS; i++)
		leaf->words[i] = old ? word_of(NBDCOW_ZERO) : 0;
	atomic_set(&leaf->stored, 0);
	atomic_set(&leaf->zeroed, old ? NBDCOW_LEAF_BLOCKS : 0);

	seen = unrcu_pointer(cmpxchg(slot, RCU_INITIALIZER(old),
				     RCU_INITIALIZER(leaf)));
	if (seen != old)	/* another installer was faster */
		kmem_cache_free(leaf_cache, leaf);
	else
		atomic_long_inc(&map->nr_leaves);
	return 0;
}

/*
 * Change the blocks of one word that @mask covers to @to. Returns how many
 * were OVERLAY and, through @zeroed, how many were ZERO.
 */
static unsigned int word_change(unsigned long *word, unsigned long mask,
				enum nbdcow_state to, unsigned int *zeroed)
{
	unsigned long old = READ_ONCE(*word), new;

	do {
		new = (old & ~mask) | (word_of(to) & mask);
		/*
		 * Data before state: what was written to the block's page is
		 * seen by whoever acquires this word in nbdcow_map_run().
		 */
	} while (!try_cmpxchg_release(word, &old, new));

	old &= mask;
	*zeroed = hweight_long(old & word_of(NBDCOW_ZERO));
	return hweight_long(old & word_of(NBDCOW_OVERLAY));
}

/**
 * nbdcow_map_change() - the one function that changes block states
 * @map: the map
 * @block: first block; its leaf exists (nbdcow_map_prepare())
 * @count: number of blocks, all in one leaf
 * @to: OVERLAY or ZERO; a block never goes back to BASE (reset makes a new map)
 *
 * BASE -> OVERLAY, ZERO -> OVERLAY, BASE -> ZERO, OVERLAY -> ZERO and
 * ZERO -> ZERO are the legal transitions.
 *
 * Context: under the shard lock: any mode for OVERLAY, for write for ZERO.
 * Return: how many of the blocks were in state OVERLAY before.
 */
unsigned long nbdcow_map_change(struct nbdcow_map *map, u64 block,
				unsigned long count, enum nbdcow_state to)
{
	struct nbdcow_leaf *leaf = leaf_get(map, block);
	unsigned long i = block & (NBDCOW_LEAF_BLOCKS - 1);
	unsigned long end = i + count, stored = 0, zeroed = 0;

	if (WARN_ON_ONCE(!is_leaf(leaf) || end > NBDCOW_LEAF_BLOCKS ||
			 (to != NBDCOW_OVERLAY && to != NBDCOW_ZERO)))
		return 0;

	while (i < end) {
		unsigned long shift = i % NBDCOW_WORD_BLOCKS;
		unsigned long n = min(NBDCOW_WORD_BLOCKS - shift, end - i);
		unsigned long mask = ~0UL >> (BITS_PER_LONG - n * NBDCOW_STATE_BITS);
		unsigned int was_zero;

		stored += word_change(&leaf->words[i / NBDCOW_WORD_BLOCKS],
				      mask << shift * NBDCOW_STATE_BITS, to,
				      &was_zero);
		zeroed += was_zero;
		i += n;
	}

	if (to == NBDCOW_OVERLAY) {
		WARN_ON_ONCE(stored);
		atomic_add(count, &leaf->stored);
		atomic_sub(zeroed, &leaf->zeroed);
		atomic_long_sub(zeroed, &map->zeroed);
	} else {
		atomic_sub(stored, &leaf->stored);
		atomic_add(count - zeroed, &leaf->zeroed);
		atomic_long_add(count - zeroed, &map->zeroed);
		if (atomic_read(&leaf->zeroed) == NBDCOW_LEAF_BLOCKS)
			nbdcow_map_zero_leaf(map, block);
	}
	return stored;
}

/**
 * nbdcow_map_zero_leaf() - make all blocks of a leaf ZERO and free the leaf
 * @map: the map
 * @block: a block of the leaf
 *
 * Needs no memory, whatever the leaf held before.
 *
 * Context: under the shard lock for write.
 * Return: how many of the blocks were in state OVERLAY before.
 */
unsigned long nbdcow_map_zero_leaf(struct nbdcow_map *map, u64 block)
{
	struct nbdcow_leaf *leaf = leaf_get(map, block);
	unsigned long stored = 0, zeroed = 0;

	if (leaf == NBDCOW_ZERO_LEAF)
		return 0;
	rcu_assign_pointer(map->leaves[nbdcow_leaf_index(block)],
			   NBDCOW_ZERO_LEAF);
	if (leaf) {
		stored = atomic_read(&leaf->stored);
		zeroed = atomic_read(&leaf->zeroed);
		atomic_long_dec(&map->nr_leaves);
		call_rcu(&leaf->rcu, leaf_free_rcu);
	}
	atomic_long_add(NBDCOW_LEAF_BLOCKS - zeroed, &map->zeroed);
	return stored;
}

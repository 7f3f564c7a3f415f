/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The block-state map: where the data of each 4 KiB block lives.
 *
 * Knows nothing of bios, devices or memory limits, so it also compiles in
 * user space, where it is tested exhaustively.
 *
 * Concurrency contract, kept by the callers (see dm-nbdcow-target.c):
 *  - look-ups run under rcu_read_lock() or the range's shard lock;
 *  - changes of a range to ZERO exclude every other change in its leaf;
 *  - changes of different blocks to OVERLAY may run in parallel, but not two
 *    of the same block.
 */
#ifndef NBDCOW_MAP_H
#define NBDCOW_MAP_H

#include <linux/atomic.h>
#include <linux/rcupdate.h>
#include <linux/types.h>

/* Two bits a block. BASE must be 0: a fresh leaf is all BASE. */
enum nbdcow_state {
	NBDCOW_BASE = 0,	/* read from the base device */
	NBDCOW_OVERLAY = 1,	/* stored whole in the overlay's tmpfs file */
	NBDCOW_ZERO = 2,	/* reads as zeroes, stores nothing */
};

#define NBDCOW_STATE_BITS	2
#define NBDCOW_STATE_MASK	((1UL << NBDCOW_STATE_BITS) - 1)
#define NBDCOW_WORD_BLOCKS	(BITS_PER_LONG / NBDCOW_STATE_BITS)
#define NBDCOW_LEAF_BLOCKS	16384UL
#define NBDCOW_LEAF_WORDS	(NBDCOW_LEAF_BLOCKS / NBDCOW_WORD_BLOCKS)

/* The states of 16,384 blocks (64 MiB of the device). */
struct nbdcow_leaf {
	struct rcu_head rcu;	/* frees the leaf once no reader can see it */
	atomic_t stored;	/* blocks in state OVERLAY */
	atomic_t zeroed;	/* blocks in state ZERO */
	unsigned long words[NBDCOW_LEAF_WORDS];
};

/* A leaf with all blocks ZERO. */
#define NBDCOW_ZERO_LEAF	((struct nbdcow_leaf *)1UL)

struct nbdcow_map {
	u64 nr_blocks;		/* size of the mapped range; constant */
	unsigned long nr_slots;	/* entries in leaves[]; constant */
	atomic_long_t nr_leaves; /* leaves allocated */
	atomic_long_t zeroed;	/* blocks in state ZERO */
	/* NULL: all BASE; NBDCOW_ZERO_LEAF: all ZERO; else a leaf */
	struct nbdcow_leaf __rcu *leaves[];
};

int nbdcow_map_init(void);
void nbdcow_map_exit(void);

struct nbdcow_map *nbdcow_map_create(u64 nr_blocks, gfp_t gfp);
void nbdcow_map_take_over(struct nbdcow_map *new, struct nbdcow_map *old);
int nbdcow_map_copy(struct nbdcow_map *to, const struct nbdcow_map *from,
		    gfp_t gfp);
void nbdcow_map_destroy(struct nbdcow_map *map);
size_t nbdcow_map_bytes(const struct nbdcow_map *map);

enum nbdcow_state nbdcow_map_run(const struct nbdcow_map *map, u64 block,
				 u64 max, u64 *run);
bool nbdcow_map_is_uniform(const struct nbdcow_map *map, u64 block, u64 count,
			   enum nbdcow_state state);
int nbdcow_map_prepare(struct nbdcow_map *map, u64 block, gfp_t gfp);
unsigned long nbdcow_map_change(struct nbdcow_map *map, u64 block,
				unsigned long count, enum nbdcow_state to);
unsigned long nbdcow_map_zero_leaf(struct nbdcow_map *map, u64 block);

/**
 * nbdcow_map_state() - the state of one block
 * @map: the map
 * @block: the block, below the map's size
 *
 * As nbdcow_map_run(), for those who know what they hope for.
 *
 * Context: any, under rcu_read_lock() or the shard lock of @block.
 * Return: the state.
 */
static inline enum nbdcow_state nbdcow_map_state(const struct nbdcow_map *map,
						 u64 block)
{
	const struct nbdcow_leaf *leaf =
		rcu_dereference_check(map->leaves[block / NBDCOW_LEAF_BLOCKS], 1);
	unsigned long i = block % NBDCOW_LEAF_BLOCKS;

	if (!leaf)
		return NBDCOW_BASE;
	if (leaf == NBDCOW_ZERO_LEAF)
		return NBDCOW_ZERO;
	/* Pairs with the release in word_change(). */
	return smp_load_acquire(&leaf->words[i / NBDCOW_WORD_BLOCKS]) >>
	       i % NBDCOW_WORD_BLOCKS * NBDCOW_STATE_BITS & NBDCOW_STATE_MASK;
}

/* Blocks from @block to the end of its leaf, at most @count. */
static inline unsigned long nbdcow_leaf_span(u64 block, u64 count)
{
	u64 left = NBDCOW_LEAF_BLOCKS - (block & (NBDCOW_LEAF_BLOCKS - 1));

	return count < left ? count : left;
}

static inline u64 nbdcow_leaf_index(u64 block)
{
	return block / NBDCOW_LEAF_BLOCKS;
}

#endif

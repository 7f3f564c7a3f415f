/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Types of dm-nbdcow and the contracts between its files. The target's file and
 * base.c hand bios to each other; both use the overlay, which uses the map and
 * the store and knows nothing of them. message.c reads all.
 */
#ifndef NBDCOW_H
#define NBDCOW_H

#include <linux/bio.h>
#include <linux/device-mapper.h>
#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/mempool.h>
#include <linux/mutex.h>
#include <linux/rwsem.h>
#include <linux/workqueue.h>

#include "map.h"

#define NBDCOW_BLOCK_SHIFT	12
#define NBDCOW_BLOCK_BYTES	4096U
#define NBDCOW_BLOCK_SECTORS	(NBDCOW_BLOCK_BYTES >> SECTOR_SHIFT)
#define NBDCOW_NO_LIMIT		ULONG_MAX
/* 8 PiB: the map's table has 1 GiB then, and file offsets fit everywhere. */
#define NBDCOW_MAX_BLOCKS	min_t(u64, 1ULL << 41, \
				      (u64)MAX_LFS_FILESIZE >> NBDCOW_BLOCK_SHIFT)

/* Shard locks of an overlay, and its locks of installers. */
#define NBDCOW_SHARDS		16
#define NBDCOW_INSTALLERS	64
/* Read-modify-writes of a device under way at once, and those sure of memory. */
#define NBDCOW_RMW_MAX		256
#define NBDCOW_RMW_RESERVE	4
#define NBDCOW_RMW_HASH_BITS	5

static inline u64 nbdcow_block(sector_t sector)
{
	return sector / NBDCOW_BLOCK_SECTORS;
}

/* What a reset throws away at once: the map and the file it speaks of. */
struct nbdcow_layer {
	struct nbdcow_map *map;	/* block states; replaced only with the layer */
	struct file *file;	/* blocks in state OVERLAY, at block * 4096 */
	atomic_long_t used;	/* blocks stored or being installed */
};

struct nbdcow_shard {
	/* read: installs blocks of its leaves; write: removes them */
	struct rw_semaphore lock;
} ____cacheline_aligned_in_smp;

/* The changes of one mapped device; survives a reload of its table. */
struct nbdcow_overlay {
	struct nbdcow_layer __rcu *layer; /* replaced under mutex and all shards */
	struct nbdcow_shard shards[NBDCOW_SHARDS]; /* by leaf */
	struct mutex installers[NBDCOW_INSTALLERS]; /* by 2 MiB: one at a time */
	unsigned long limit;	/* most blocks stored; changes any time */
	atomic_long_t peak;	/* most blocks ever stored since creation */
	atomic_long_t refused;	/* writes that failed for want of space */
	atomic_long_t base_errors; /* failed reads of the base */
	atomic_t level;		/* enum nbdcow_level, to see it rise */
	bool store_full;	/* there was no page for the last new block */
	struct mem_cgroup *memcg; /* creator's, charged for pages and leaves */
	struct mutex mutex;	/* reset, growth, event_ti */
	struct dm_target *event_ti; /* whose table gets events; under mutex */
	struct work_struct event_work; /* sends one */
	struct kref kref;	/* one per table; under overlays_mutex */
	struct list_head list;	/* all overlays; under overlays_mutex */
	struct mapped_device *md; /* key of the overlay, constant */
	sector_t base_sectors;	/* size of the base, constant: one view for all */
	char *tmpfs_dir;	/* as given, or NULL; constant */
};

enum nbdcow_level {
	NBDCOW_OK,		/* below 80 % of the limit */
	NBDCOW_HIGH,		/* from there on */
	NBDCOW_FULL,		/* a new block would be refused */
};

/* A table's only line. */
struct nbdcow_target {
	struct dm_target *ti;	/* its device-mapper side */
	struct dm_dev *base;	/* opened read-only */
	struct block_device *self; /* what bios have that were not remapped */
	struct nbdcow_overlay *overlay; /* shared with other tables of the device */
	unsigned long limit;	/* taken over by the overlay at resume */
	bool base_failed;	/* the last read of the base failed */
	spinlock_t rmw_lock;	/* for the rest; process context only */
	unsigned int rmw_inflight; /* descriptors in use */
	struct bio_list rmw_waiting; /* bios that found no descriptor */
	struct hlist_head rmw_hash[1 << NBDCOW_RMW_HASH_BITS]; /* by block */
	mempool_t rmw_pool;	/* descriptors */
	mempool_t rmw_pages;	/* their pages */
};

enum nbdcow_context {
	NBDCOW_NOWAIT,		/* nothing: -EAGAIN instead */
	NBDCOW_MAP,		/* locks and easy memory: else -EINPROGRESS */
	NBDCOW_WORK,		/* swap I/O and memory as well */
};

/* Some or all bytes of one block, on their way between a bio and the overlay. */
struct nbdcow_piece {
	struct bio *bio;	/* a WRITE_ZEROES bio stands for zeroes */
	struct bvec_iter iter;	/* where in the bio; advanced on success */
	u64 block;		/* which block */
	unsigned int offset;	/* first byte within the block */
	unsigned int bytes;	/* how many */
	const void *base;	/* the base's content of the whole block, or NULL */
	bool base_is_zero;	/* the block lies past the end of the base */
	enum nbdcow_context context; /* what may be waited for */
	bool new_block;		/* set if it failed for want of a new block */
};

/* Beside each bio of ours. */
struct nbdcow_io {
	struct work_struct work; /* goes on with the bio outside of map() */
	struct nbdcow_target *t;
};

/* dm-nbdcow-target.c */
extern struct workqueue_struct *nbdcow_wq;
void nbdcow_piece_init(struct nbdcow_piece *piece, struct nbdcow_target *t,
		       struct bio *bio, struct bvec_iter iter);
void nbdcow_bio_complete(struct bio *bio, int error);
int nbdcow_defer(struct nbdcow_target *t, struct bio *bio);
void nbdcow_base_done(struct nbdcow_target *t, blk_status_t status);

/* overlay.c */
extern unsigned long nbdcow_total_limit;
extern atomic_long_t nbdcow_total_used;
struct nbdcow_overlay *nbdcow_overlay_get(struct dm_target *ti,
					  struct block_device *base,
					  const char *tmpfs_dir, char **error);
void nbdcow_overlay_put(struct nbdcow_overlay *ov);
enum nbdcow_state nbdcow_overlay_state(struct nbdcow_overlay *ov, u64 block,
				       u64 max, u64 *run);
int nbdcow_overlay_read(struct nbdcow_overlay *ov, struct nbdcow_piece *piece);
int nbdcow_overlay_write(struct nbdcow_overlay *ov, struct nbdcow_piece *piece);
int nbdcow_overlay_wait(struct nbdcow_overlay *ov, struct nbdcow_piece *piece,
			int (*action)(struct nbdcow_overlay *ov,
				      struct nbdcow_piece *piece));
int nbdcow_overlay_zero(struct nbdcow_overlay *ov, u64 block, u64 count);
int nbdcow_overlay_reset(struct nbdcow_overlay *ov);
void nbdcow_overlay_set_limit(struct nbdcow_overlay *ov, unsigned long limit);
void nbdcow_overlay_set_event(struct nbdcow_overlay *ov, struct dm_target *ti,
			      bool on);
enum nbdcow_level nbdcow_overlay_level(struct nbdcow_overlay *ov);

/* store.c */
struct file *nbdcow_store_create(const char *dir, char **error);
struct file *nbdcow_store_another(struct file *file);
void nbdcow_store_destroy(struct file *file);
struct page *nbdcow_store_find(struct file *file, u64 block);
bool nbdcow_store_lock(struct file *file, struct page *page, bool nowait);
gfp_t nbdcow_gfp(enum nbdcow_context context);
struct page *nbdcow_store_get_locked(struct file *file, u64 block,
				     enum nbdcow_context context, bool stored);
void nbdcow_store_punch(struct file *file, u64 block, u64 count);
void nbdcow_zero_bio(struct bio *bio, struct bvec_iter *iter,
		     unsigned int bytes);
void nbdcow_copy_from_page(struct nbdcow_piece *piece, struct page *page);
void nbdcow_copy_to_page(struct nbdcow_piece *piece, struct page *page);
void nbdcow_fill_page(const struct nbdcow_piece *piece, struct page *page,
		      const void *content);

/* base.c */
int nbdcow_rmw_init(struct nbdcow_target *t);
void nbdcow_rmw_exit(struct nbdcow_target *t);
void nbdcow_rmw_submit(struct nbdcow_target *t, struct bio *bio);
void nbdcow_rmw_next(struct nbdcow_target *t);

/* message.c */
int nbdcow_parse_limit(const char *arg, unsigned long *limit);
int nbdcow_decode_path(char *path);
void nbdcow_status(struct dm_target *ti, status_type_t type,
		   unsigned int status_flags, char *result, unsigned int maxlen);
int nbdcow_message(struct dm_target *ti, unsigned int argc, char **argv,
		   char *result, unsigned int maxlen);

#endif

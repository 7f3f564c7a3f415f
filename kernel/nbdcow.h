/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Types of dm-nbdcow and the contracts between its files. io.c, base.c and rmw.c
 * hand bios to each other; all use the overlay, which uses the map and the store
 * and knows nothing of them. message.c reads all.
 */
#ifndef NBDCOW_H
#define NBDCOW_H

#include <linux/bio.h>
#include <linux/device-mapper.h>
#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/mempool.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/rwsem.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "map.h"

#define NBDCOW_BLOCK_SHIFT	12
#define NBDCOW_BLOCK_BYTES	4096U
#define NBDCOW_BLOCK_SECTORS	(NBDCOW_BLOCK_BYTES >> SECTOR_SHIFT)
#define NBDCOW_NO_LIMIT		ULONG_MAX
/* A huge page of tmpfs, where pages have 4 KiB. */
#define NBDCOW_HUGE_BLOCKS	512U
/* 8 PiB: the map's table has 1 GiB then, and file offsets fit everywhere. */
#define NBDCOW_MAX_BLOCKS	min_t(u64, 1ULL << 41, \
				      (u64)MAX_LFS_FILESIZE >> NBDCOW_BLOCK_SHIFT)

/* Shard locks of an overlay, and its locks of installers. */
#define NBDCOW_SHARDS		16
#define NBDCOW_INSTALLERS	64
/* Read-modify-writes of a device under way at once; one is sure of memory. */
#define NBDCOW_RMW_MAX		256
#define NBDCOW_RMW_RESERVE	1
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
	struct kref kref;	/* the overlay's, and one per view */
	struct nbdcow_overlay *overlay; /* whose it was, while work is queued */
	struct rcu_work work;	/* drops the overlay's reference after a reset */
};

struct nbdcow_shard {
	/* read: installs blocks of its leaves; write: removes them */
	struct rw_semaphore lock;
} ____cacheline_aligned_in_smp;

/* Sectors read, by where they came from. */
struct nbdcow_stats {
	unsigned long overlay;	/* the overlay */
	unsigned long hits;	/* the cache */
	unsigned long misses;	/* the base, through the cache */
	unsigned long base;	/* the base, past the cache */
};

/* The changes of one mapped device; survives a reload of its table. */
struct nbdcow_overlay {
	struct nbdcow_layer __rcu *layer; /* replaced under mutex and all shards */
	struct nbdcow_shard shards[NBDCOW_SHARDS]; /* by leaf */
	struct mutex installers[NBDCOW_INSTALLERS]; /* by 2 MiB: one at a time */
	unsigned long limit;	/* most blocks stored; changes any time */
	atomic_long_t peak;	/* most blocks ever stored since creation */
	atomic_long_t refused;	/* writes that failed for want of space */
	atomic_long_t base_errors; /* failed reads of the base */
	struct nbdcow_stats __percpu *stats; /* reads */
	atomic_t level;		/* enum nbdcow_level, to see it rise */
	bool store_full;	/* there was no page for the last new block */
	atomic_t dying;		/* layers that a reset has still to drop */
	struct mem_cgroup *memcg; /* creator's, charged for pages and leaves */
	struct mutex mutex;	/* reset, growth, views, event_ti */
	struct list_head views;	/* change under mutex and all shards; RCU */
	struct dm_target *event_ti; /* whose table gets events; under mutex */
	struct delayed_work event_work; /* sends one */
	struct kref kref;	/* one per table and view */
	unsigned int tables;	/* how many; under overlays_mutex */
	struct list_head list;	/* those with a table; under overlays_mutex */
	struct mapped_device *md; /* key of the overlay, gone after its tables */
	sector_t base_sectors;	/* size of the base, constant: one view for all */
	unsigned int base_sector_bytes; /* its logical blocks, constant likewise */
	sector_t length;	/* of the live table, 0 before; under mutex */
	char *tmpfs_dir;	/* as given, or NULL; constant */
};

/* What the overlay was at one instant. Blocks that change later are saved. */
struct nbdcow_view {
	struct nbdcow_overlay *overlay;
	struct list_head list;	/* the overlay's views */
	struct nbdcow_layer *layer; /* of that instant; NULL before, then constant */
	struct nbdcow_map *states; /* likewise; OVERLAY: in layer, unless saved */
	struct nbdcow_map *saved; /* OVERLAY: in file; changes as a layer's map */
	struct file *file;	/* blocks as they were */
	atomic_long_t nr_saved;	/* how many */
	bool failed;		/* one could not be saved: the view is lost */
};

enum nbdcow_level {
	NBDCOW_OK,		/* below 80 % of the limit */
	NBDCOW_HIGH,		/* from there on */
	NBDCOW_FULL,		/* a new block would be refused */
};

/* What all overlays on one base device share; goes with the last of them. */
struct nbdcow_base {
	struct block_device *bdev; /* key, constant; open while there are users */
	struct xarray blocks;	/* by block: a page, or a fetch under way */
	atomic_long_t cached;	/* how many, of both */
	atomic_long_t evicted;	/* dropped for want of room or memory */
	unsigned long limit;	/* most blocks cached; changes under mutex */
	unsigned long hand;	/* where eviction goes on; under blocks' lock */
	struct nbdcow_map __rcu *holes; /* ZERO: known to be; under mutex */
	struct workqueue_struct *wq; /* reads it outside of map(), hangs with it */
	struct mutex mutex;	/* limit, targets, holes */
	struct list_head targets; /* that have a say in limit; under mutex */
	struct kref kref;	/* one per target and fetch */
	unsigned int nr_users;	/* targets; under bases_mutex */
	struct list_head list;	/* all bases that have targets; under bases_mutex */
};

enum nbdcow_prefetch_state {
	NBDCOW_PREFETCH_NONE,	/* there was none */
	NBDCOW_PREFETCH_RUNNING,
	NBDCOW_PREFETCH_DONE,
	NBDCOW_PREFETCH_STOPPED, /* by a message */
	NBDCOW_PREFETCH_FULL,	/* no room or no memory for more */
	NBDCOW_PREFETCH_FAILED,	/* the base gave an error */
};

struct nbdcow_prefetch {
	spinlock_t lock;	/* for all but next, not_before and work */
	enum nbdcow_prefetch_state state; /* as it says */
	bool paused;		/* for a suspend */
	unsigned int inflight;	/* reads under way, and one being begun */
	unsigned int rate;	/* most KiB a second, or 0; constant while it runs */
	u64 first, end;		/* blocks; constant while it runs */
	u64 next;		/* where to go on; the work's own */
	u64 not_before;		/* no read till then, in ns of ktime; likewise */
	struct delayed_work work; /* begins reads */
};

/* A table's only line. */
struct nbdcow_target {
	struct dm_target *ti;	/* its device-mapper side */
	struct dm_dev *dev;	/* the base device, opened read-only */
	struct nbdcow_base *base; /* shared with other overlays on the device */
	struct block_device *self; /* what bios have that were not remapped */
	struct nbdcow_overlay *overlay; /* shared with other tables of the device */
	unsigned long limit;	/* taken over by the overlay at resume */
	unsigned long cache_limit; /* wish for the base; set under its mutex */
	struct list_head list;	/* targets of the base; under its mutex */
	bool cow_on_read;	/* reads fill the cache */
	bool cow_on_cache;	/* so does read-ahead */
	struct nbdcow_prefetch prefetch; /* fills the cache in the background */
	bool base_failed;	/* the last read of the base failed */
	bool queue_errors;	/* failed reads of the base wait, and try again */
	bool queue_closed;	/* but not during a suspend */
	bool closed_noflush;	/* which is without flush */
	spinlock_t queue_lock;	/* for the three before and the two after; any context */
	struct bio_list queued;	/* that wait */
	unsigned int nr_queued;	/* how many */
	struct delayed_work retry_work; /* tries again */
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

/* From one stored block of a file to the next. */
struct nbdcow_walk {
	struct xa_state xas;
	struct folio *large;	/* the one it stands in, with a reference, or NULL */
	pgoff_t large_index;	/* of its first page */
};

static inline void nbdcow_store_walk_begin(struct nbdcow_walk *walk,
					   struct file *file)
{
	walk->xas = (struct xa_state)__XA_STATE(&file->f_mapping->i_pages, 0, 0, 0);
	walk->large = NULL;
}

static inline void nbdcow_store_walk_end(struct nbdcow_walk *walk)
{
	if (unlikely(walk->large)) {
		folio_put(walk->large);
		walk->large = NULL;
	}
}

/*
 * Is a page that was found still the file's? One on its way back from swap has the
 * mapping before tmpfs knows whether it may come back, but is in the swap cache then. It
 * entered that before the mapping went, so the flag is looked at first.
 */
static inline bool nbdcow_store_has(struct file *file, struct page *page)
{
	struct folio *folio = page_folio(page);

	if (unlikely(folio_test_swapcache(folio)))
		return false;
	smp_rmb();	/* the flag before the mapping */
	return READ_ONCE(folio->mapping) == file->f_mapping;
}

/* Some or all bytes of one block, on their way between a bio and the overlay. */
struct nbdcow_piece {
	struct bio *bio;	/* a WRITE_ZEROES bio stands for zeroes */
	struct bvec_iter iter;	/* where in the bio; advanced on success */
	u64 block;		/* which block */
	unsigned int offset;	/* first byte within the block */
	unsigned int bytes;	/* how many */
	const void *base;	/* the base's content of the whole block, or NULL */
	bool base_is_zero;	/* that is all zeroes, as is known */
	enum nbdcow_context context; /* what may be waited for */
	bool new_block;		/* it was tried to store a new one */
};

/* Beside each bio of ours. */
struct nbdcow_io {
	struct work_struct work; /* goes on with the bio outside of map() */
	struct nbdcow_target *t; /* whose bio it is */
	struct bvec_iter iter;	/* of a read: what is left of it to do */
	unsigned short flags;	/* the bio's, before it was remapped */
	bool mixed;		/* blocks are to be added from elsewhere than the base */
	bool spans;		/* the base is asked for such blocks as well */
	unsigned int got;	/* bytes at the iterator that come from the base */
};

/* dm-nbdcow-target.c */
extern struct workqueue_struct *nbdcow_wq;
extern struct workqueue_struct *nbdcow_long_wq;
bool *nbdcow_find_flag(struct nbdcow_target *t, const char *name);

/* io.c */
int nbdcow_io_init(struct nbdcow_target *t);
void nbdcow_io_exit(struct nbdcow_target *t);
int nbdcow_map(struct dm_target *ti, struct bio *bio);
int nbdcow_end_io(struct dm_target *ti, struct bio *bio, blk_status_t *status);
void nbdcow_queue_errors(struct nbdcow_target *t, bool on);
void nbdcow_queue_close(struct nbdcow_target *t, bool closed);
char nbdcow_extent(struct dm_target *ti, u64 block, u64 max, u64 *run);
void nbdcow_piece_init(struct nbdcow_piece *piece, struct dm_target *ti,
		       struct bio *bio, struct bvec_iter iter);
void nbdcow_bio_complete(struct bio *bio, int error);
int nbdcow_defer(struct nbdcow_target *t, struct bio *bio);
bool nbdcow_accept_async(struct bio *bio, unsigned int sectors);
void nbdcow_read_base(struct bio *bio);
void nbdcow_base_done(struct nbdcow_target *t, blk_status_t status);
void nbdcow_base_failed(struct nbdcow_target *t, struct bio *bio,
			blk_status_t status);

/* overlay.c */
extern unsigned long nbdcow_total_limit;
void nbdcow_overlay_set_total(unsigned long blocks);
extern atomic_long_t nbdcow_total_used;
struct nbdcow_overlay *nbdcow_overlay_get(struct dm_target *ti,
					  struct block_device *base,
					  const char *tmpfs_dir, char **error);
void nbdcow_overlay_put(struct nbdcow_overlay *ov);
bool nbdcow_overlay_set_length(struct nbdcow_overlay *ov, sector_t sectors);
enum nbdcow_state nbdcow_overlay_state(struct nbdcow_overlay *ov, u64 block,
				       u64 max, u64 *run);
enum nbdcow_state nbdcow_overlay_block(struct nbdcow_overlay *ov, u64 block);
unsigned int nbdcow_overlay_copy(struct nbdcow_overlay *ov,
				 struct nbdcow_piece *piece, unsigned int bytes);
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
void nbdcow_overlay_event(struct nbdcow_overlay *ov);

struct nbdcow_view *nbdcow_view_create(dev_t dev, sector_t sectors, char **error);
void nbdcow_view_destroy(struct nbdcow_view *view);
int nbdcow_view_freeze(struct nbdcow_view *view);
int nbdcow_view_read(struct nbdcow_view *view, struct nbdcow_piece *piece);

/* store.c */
struct file *nbdcow_store_create(const char *dir, char **error);
struct file *nbdcow_store_another(struct file *file);
void nbdcow_store_destroy(struct file *file);
struct page *nbdcow_store_walk(struct nbdcow_walk *walk, struct file *file,
			       u64 block);
bool nbdcow_store_lock(struct file *file, struct page *page, bool nowait);
gfp_t nbdcow_gfp(enum nbdcow_context context);
struct page *nbdcow_store_get_locked(struct file *file, u64 block,
				     enum nbdcow_context context, bool stored);
struct page *nbdcow_store_new(struct file *file, u64 block,
			      enum nbdcow_context context);
void nbdcow_store_filled(struct page *page, u64 block);
void nbdcow_store_punch(struct file *file, u64 block, u64 count);
void nbdcow_zero_bio(struct bio *bio, struct bvec_iter *iter,
		     unsigned int bytes);
void nbdcow_copy_from_page(struct nbdcow_piece *piece, struct page *page);
void nbdcow_copy_to_page(struct nbdcow_piece *piece, struct page *page);
void nbdcow_copy_block(struct page *to, struct page *from, u64 block);
void nbdcow_fill_page(const struct nbdcow_piece *piece, struct page *page,
		      const void *content);

/* base.c */
int nbdcow_shrinker_init(void);
void nbdcow_shrinker_exit(void);
int nbdcow_base_init(struct nbdcow_target *t);
void nbdcow_base_exit(struct nbdcow_target *t);
void nbdcow_base_set_limit(struct nbdcow_target *t, unsigned long limit);
bool nbdcow_base_hole(struct nbdcow_base *base, u64 block, u64 max, u64 *run);
int nbdcow_base_add_hole(struct nbdcow_target *t, u64 block, u64 count);
void *nbdcow_cache_address(struct page *page, u64 block);
struct page *nbdcow_cache_find(struct nbdcow_base *base, u64 block);
void nbdcow_cache_add(struct nbdcow_base *base, u64 block, const void *content);
u64 nbdcow_cache_gap(struct nbdcow_base *base, u64 block, u64 max);
int nbdcow_cache_fetch(struct nbdcow_target *t, struct bio *bio,
		       unsigned int sectors);
void nbdcow_cache_drop(struct nbdcow_base *base);
int nbdcow_prefetch_start(struct nbdcow_target *t, u64 block, u64 count,
			  unsigned int rate);
void nbdcow_prefetch_stop(struct nbdcow_target *t);
void nbdcow_prefetch_pause(struct nbdcow_target *t, bool pause);

/* rmw.c */
int nbdcow_rmw_init(struct nbdcow_target *t);
void nbdcow_rmw_exit(struct nbdcow_target *t);
void nbdcow_rmw_submit(struct nbdcow_target *t, struct bio *bio, bool in_work);
void nbdcow_rmw_next(struct nbdcow_target *t);

/* message.c */
int nbdcow_parse_limit(const char *arg, unsigned long *limit);
int nbdcow_decode_path(char *path);
void nbdcow_status(struct dm_target *ti, status_type_t type,
		   unsigned int status_flags, char *result, unsigned int maxlen);
int nbdcow_message(struct dm_target *ti, unsigned int argc, char **argv,
		   char *result, unsigned int maxlen);
int nbdcow_extents(struct dm_target *ti, unsigned int argc, char **argv,
		   char *result, unsigned int maxlen,
		   char (*extent)(struct dm_target *ti, u64 block, u64 max,
				  u64 *run));

/* view.c */
extern struct target_type nbdcow_view_type;

#endif

// SPDX-License-Identifier: GPL-2.0-only
/*
 * The overlay: installs, reads, zeroes and drops blocks, and keeps the limits.
 * The locking rules are in the design comment of dm-nbdcow-target.c.
 */
#include <linux/memcontrol.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "compat.h"
#include "nbdcow.h"

#define DM_MSG_PREFIX "nbdcow"

/* How often, and after how long, a write without memory tries again. */
#define NBDCOW_NOMEM_TRIES	25
#define NBDCOW_NOMEM_WAIT	(HZ / 50 + 1)

/* The most blocks that all overlays together may store, and do store. */
unsigned long nbdcow_total_limit;
atomic_long_t nbdcow_total_used;

static DEFINE_MUTEX(overlays_mutex);
static LIST_HEAD(overlays);

static struct rw_semaphore *shard(struct nbdcow_overlay *ov, u64 block)
{
	return &ov->shards[nbdcow_leaf_index(block) % NBDCOW_SHARDS].lock;
}

/* The layer, for holders of any shard lock or of the mutex. */
static struct nbdcow_layer *layer_of(struct nbdcow_overlay *ov)
{
	return rcu_dereference_protected(ov->layer, 1);
}

/*
 * Layers
 */

static void layer_destroy(struct nbdcow_layer *layer)
{
	if (!layer)
		return;
	nbdcow_store_destroy(layer->file);
	nbdcow_map_destroy(layer->map);
	atomic_long_sub(atomic_long_read(&layer->used), &nbdcow_total_used);
	kfree(layer);
}

static struct nbdcow_layer *layer_create(u64 nr_blocks, const char *tmpfs_dir,
					 char **error)
{
	struct nbdcow_layer *layer = kzalloc(sizeof(*layer), GFP_KERNEL_ACCOUNT);
	struct file *file;

	if (layer)
		layer->map = nbdcow_map_create(nr_blocks);
	if (!layer || !layer->map) {
		*error = "Not enough memory for the block-state map";
		layer_destroy(layer);
		return ERR_PTR(-ENOMEM);
	}
	file = nbdcow_store_create(tmpfs_dir, error);
	if (IS_ERR(file)) {
		layer_destroy(layer);
		return ERR_CAST(file);
	}
	layer->file = file;
	return layer;
}

static void lock_all_shards(struct nbdcow_overlay *ov)
{
	int i;

	for (i = 0; i < NBDCOW_SHARDS; i++)
		down_write_nest_lock(&ov->shards[i].lock, &ov->mutex);
}

static void unlock_all_shards(struct nbdcow_overlay *ov)
{
	int i;

	for (i = NBDCOW_SHARDS - 1; i >= 0; i--)
		up_write(&ov->shards[i].lock);
}

/*
 * Limits
 */

/**
 * nbdcow_overlay_level() - how full the overlay is
 * @ov: the overlay
 *
 * Context: any.
 * Return: NBDCOW_FULL if a new block would be refused now, NBDCOW_HIGH from
 *	80 % of the limit on, NBDCOW_OK below.
 */
enum nbdcow_level nbdcow_overlay_level(struct nbdcow_overlay *ov)
{
	unsigned long limit = READ_ONCE(ov->limit), used;

	rcu_read_lock();
	used = atomic_long_read(&rcu_dereference(ov->layer)->used);
	rcu_read_unlock();

	if (used >= limit || READ_ONCE(ov->store_full) ||
	    atomic_long_read(&nbdcow_total_used) >= READ_ONCE(nbdcow_total_limit))
		return NBDCOW_FULL;
	return used >= limit - limit / 5 ? NBDCOW_HIGH : NBDCOW_OK;
}

/* Note the level, and tell user space when it rose. */
static void level_update(struct nbdcow_overlay *ov)
{
	int new = nbdcow_overlay_level(ov);
	int old = atomic_read(&ov->level);

	if (new != old && atomic_cmpxchg(&ov->level, old, new) == old &&
	    new > old)
		queue_work(nbdcow_wq, &ov->event_work);
}

static void event_work(struct work_struct *work)
{
	struct nbdcow_overlay *ov =
		container_of(work, struct nbdcow_overlay, event_work);

	mutex_lock(&ov->mutex);
	if (ov->event_ti)
		dm_table_event(ov->event_ti->table);
	mutex_unlock(&ov->mutex);
}

static bool reserve(struct nbdcow_overlay *ov, struct nbdcow_layer *layer)
{
	long used = atomic_long_inc_return(&layer->used);
	long peak = atomic_long_read(&ov->peak);

	if (used > READ_ONCE(ov->limit))
		goto refuse;
	if (atomic_long_inc_return(&nbdcow_total_used) >
	    READ_ONCE(nbdcow_total_limit)) {
		atomic_long_dec(&nbdcow_total_used);
		goto refuse;
	}
	while (used > peak &&
	       !atomic_long_try_cmpxchg(&ov->peak, &peak, used))
		;
	return true;

refuse:
	atomic_long_dec(&layer->used);
	return false;
}

static void unreserve(struct nbdcow_layer *layer, unsigned long blocks)
{
	atomic_long_sub(blocks, &layer->used);
	atomic_long_sub(blocks, &nbdcow_total_used);
}

/* A write found no space; say so once a while. */
static void refused(struct nbdcow_overlay *ov, int error)
{
	atomic_long_inc(&ov->refused);
	DMWARN_LIMIT("%s: no space for a new block (error %d)",
		     dm_device_name(ov->md), error);
	level_update(ov);
}

/*
 * The data path
 */

/**
 * nbdcow_overlay_state() - the state of a block, and for how long it lasts
 * @ov: the overlay
 * @block: first block
 * @max: most blocks that the caller cares for
 * @run: set to the number of blocks that share the state
 *
 * The answer may be outdated at once; see nbdcow_map_run().
 *
 * Context: any, does not sleep.
 * Return: the state.
 */
enum nbdcow_state nbdcow_overlay_state(struct nbdcow_overlay *ov, u64 block,
				       u64 max, u64 *run)
{
	enum nbdcow_state state;

	rcu_read_lock();
	state = nbdcow_map_run(rcu_dereference(ov->layer)->map, block, max, run);
	rcu_read_unlock();
	return state;
}

/*
 * Get the page of a stored block without any lock, or NULL: not stored, or not
 * in memory.
 *
 * The page comes first and the state second. If a discard had removed the
 * block before the page was found, then the page could be a new installer's,
 * not yet filled; but the discard changed the state before that installer got
 * its lock, so the state read here would no longer be the old OVERLAY.
 */
static struct page *find_stored(struct nbdcow_overlay *ov, u64 block)
{
	struct nbdcow_layer *layer;
	struct page *page;
	u64 run;

	rcu_read_lock();
	layer = rcu_dereference(ov->layer);
	page = nbdcow_store_find(layer->file, block);
	if (page &&
	    nbdcow_map_run(layer->map, block, 1, &run) != NBDCOW_OVERLAY) {
		put_page(page);
		page = NULL;
	}
	rcu_read_unlock();
	return page;
}

static bool lock_shard_read(struct rw_semaphore *lock, bool nowait)
{
	if (nowait)
		return down_read_trylock(lock);
	down_read(lock);
	return true;
}

/**
 * nbdcow_overlay_read() - read bytes of a stored block
 * @ov: the overlay
 * @piece: which bytes; its iterator is advanced on success
 *
 * Context: process context; sleeps only to bring a page back from swap, and
 *	not if the piece says nowait.
 * Return: 0; -ESTALE if the block is not in state OVERLAY any more; -EAGAIN
 *	instead of sleeping; -EIO or -ENOMEM from swapping in.
 */
int nbdcow_overlay_read(struct nbdcow_overlay *ov, struct nbdcow_piece *piece)
{
	struct rw_semaphore *lock = shard(ov, piece->block);
	struct nbdcow_layer *layer;
	struct page *page = find_stored(ov, piece->block);
	int ret = 0;
	u64 run;

	if (likely(page)) {
		nbdcow_copy_from_page(piece, page);
		put_page(page);
		return 0;
	}

	if (!lock_shard_read(lock, piece->nowait))
		return -EAGAIN;
	layer = layer_of(ov);
	if (nbdcow_map_run(layer->map, piece->block, 1, &run) != NBDCOW_OVERLAY) {
		ret = -ESTALE;
		goto out;
	}
	page = nbdcow_store_get_locked(layer->file, piece->block, piece->nowait,
				       true);
	if (IS_ERR(page)) {
		ret = PTR_ERR(page);
		goto out;
	}
	nbdcow_copy_from_page(piece, page);
	unlock_page(page);
	put_page(page);
out:
	up_read(lock);
	return ret;
}

/* Write to a block that is stored and in memory, without any lock. */
static bool rewrite(struct nbdcow_overlay *ov, struct nbdcow_piece *piece)
{
	struct page *page;
	u64 run;

	if (nbdcow_overlay_state(ov, piece->block, 1, &run) != NBDCOW_OVERLAY)
		return false;
	page = find_stored(ov, piece->block);
	if (!page)
		return false;
	nbdcow_copy_to_page(piece, page);
	/*
	 * Dirty before the reference goes, or reclaim may drop the bytes. And
	 * the bytes before the look whether it is dirty already, or reclaim may
	 * clear the flag and write the page without them. Pairs with the
	 * atomic test and clear in folio_clear_dirty_for_io().
	 */
	smp_mb();
	set_page_dirty(page);
	put_page(page);
	return true;
}

/* Copy the piece to its locked page and publish the block if it is new. */
static void fill_and_publish(struct nbdcow_layer *layer,
			     struct nbdcow_piece *piece, struct page *page,
			     enum nbdcow_state state)
{
	if (state != NBDCOW_OVERLAY && piece->bytes < NBDCOW_BLOCK_BYTES)
		nbdcow_fill_page(piece, page,
				 state == NBDCOW_BASE ? piece->base : NULL);
	nbdcow_copy_to_page(piece, page);
	set_page_dirty(page);
	if (state != NBDCOW_OVERLAY)
		nbdcow_map_change(layer->map, piece->block, 1, NBDCOW_OVERLAY);
}

/* Make room for a new block: in the limits, and in the map. */
static int prepare_block(struct nbdcow_overlay *ov, struct nbdcow_layer *layer,
			 u64 block, bool nowait)
{
	gfp_t gfp = (nowait ? GFP_NOWAIT : GFP_NOIO) | __GFP_ACCOUNT |
		    __GFP_NOWARN;

	if (!reserve(ov, layer))
		return -EDQUOT;
	if (nbdcow_map_prepare(layer->map, block, gfp)) {
		unreserve(layer, 1);
		return nowait ? -EAGAIN : -ENOMEM;
	}
	return 0;
}

static int __overlay_write(struct nbdcow_overlay *ov, struct nbdcow_piece *piece)
{
	struct nbdcow_layer *layer = layer_of(ov);
	struct mem_cgroup *old_memcg;
	enum nbdcow_state state;
	struct page *page;
	bool new;
	u64 run;
	int ret = 0;

	lockdep_assert_held_read(shard(ov, piece->block));

	state = nbdcow_map_run(layer->map, piece->block, 1, &run);
	if (state == NBDCOW_BASE && piece->bytes < NBDCOW_BLOCK_BYTES &&
	    !piece->base && !piece->base_is_zero)
		return -ENODATA;
	new = state != NBDCOW_OVERLAY;

	old_memcg = set_active_memcg(ov->memcg);
	if (new)
		ret = prepare_block(ov, layer, piece->block, piece->nowait);
	if (ret)
		goto out;

	page = nbdcow_store_get_locked(layer->file, piece->block, piece->nowait,
				       !new);
	if (IS_ERR(page)) {
		ret = PTR_ERR(page);
		if (new)
			unreserve(layer, 1);
		goto out;
	}

	/* Another installer of this block may have been faster. */
	state = nbdcow_map_run(layer->map, piece->block, 1, &run);
	if (new && state == NBDCOW_OVERLAY)
		unreserve(layer, 1);
	fill_and_publish(layer, piece, page, state);
	unlock_page(page);
	put_page(page);
	if (new && unlikely(READ_ONCE(ov->store_full)))
		WRITE_ONCE(ov->store_full, false);
out:
	set_active_memcg(old_memcg);
	return ret;
}

/**
 * nbdcow_overlay_write() - write bytes of one block to the overlay
 * @ov: the overlay
 * @piece: which bytes; its iterator is advanced on success
 *
 * On an error the block reads as before.
 *
 * Context: process context; sleeps unless the piece says nowait; GFP_NOIO.
 * Return: 0; -ENODATA if the block is in state BASE, the piece covers only a
 *	part of it and does not bring the base's content; -ENOSPC over a limit;
 *	-ENOMEM; -EIO from swap; -EAGAIN instead of sleeping.
 */
int nbdcow_overlay_write(struct nbdcow_overlay *ov, struct nbdcow_piece *piece)
{
	struct rw_semaphore *lock = shard(ov, piece->block);
	unsigned int tries = READ_ONCE(ov->store_full) ? 1 : NBDCOW_NOMEM_TRIES;
	int ret;

	if (rewrite(ov, piece))
		return 0;

	for (;;) {
		if (!lock_shard_read(lock, piece->nowait))
			return -EAGAIN;
		ret = __overlay_write(ov, piece);
		up_read(lock);
		if (ret != -ENOMEM || --tries == 0)
			break;
		/* kswapd can do what GFP_NOIO cannot: swap out. */
		schedule_timeout_uninterruptible(NBDCOW_NOMEM_WAIT);
	}

	if (!ret) {
		level_update(ov);
	} else if (ret == -EDQUOT) {
		ret = -ENOSPC;
		refused(ov, ret);
	} else if (ret == -ENOSPC || ret == -ENOMEM) {
		WRITE_ONCE(ov->store_full, true);
		refused(ov, ret);
	}
	return ret;
}

/* Zero blocks of one leaf. */
static int __zero_leaf(struct nbdcow_overlay *ov, u64 block, unsigned long count)
{
	struct nbdcow_layer *layer = layer_of(ov);
	struct mem_cgroup *old_memcg;
	unsigned long stored;
	int ret;

	lockdep_assert_held_write(shard(ov, block));

	if (nbdcow_map_is_uniform(layer->map, block, count, NBDCOW_ZERO))
		return 0;

	if (count == NBDCOW_LEAF_BLOCKS) {
		stored = nbdcow_map_zero_leaf(layer->map, block);
	} else {
		/* Must work in a full memory cgroup too: it frees memory. */
		old_memcg = set_active_memcg(ov->memcg);
		ret = nbdcow_map_prepare(layer->map, block, GFP_NOIO |
					 __GFP_ACCOUNT | __GFP_NOWARN);
		set_active_memcg(old_memcg);
		if (ret)
			ret = nbdcow_map_prepare(layer->map, block, GFP_NOIO);
		if (ret)
			return ret;
		stored = nbdcow_map_change(layer->map, block, count, NBDCOW_ZERO);
	}

	/* The state first: nobody may look for a page that is going. */
	if (stored) {
		nbdcow_store_punch(layer->file, block, count);
		unreserve(layer, stored);
		WRITE_ONCE(ov->store_full, false);
	}
	return 0;
}

/**
 * nbdcow_overlay_zero() - make whole blocks read as zeroes, free their pages
 * @ov: the overlay
 * @block: first block
 * @count: number of blocks
 * @nowait: do not sleep
 *
 * Works when the overlay is full.
 *
 * Context: process context; sleeps.
 * Return: 0; -EAGAIN instead of sleeping; -ENOMEM when not even a leaf of the
 *	map can be had, with the blocks of that leaf as before.
 */
int nbdcow_overlay_zero(struct nbdcow_overlay *ov, u64 block, u64 count,
			bool nowait)
{
	int ret = 0;

	if (nowait)
		return -EAGAIN;

	while (count && !ret) {
		unsigned long n = nbdcow_leaf_span(block, count);
		struct rw_semaphore *lock = shard(ov, block);

		down_write(lock);
		ret = __zero_leaf(ov, block, n);
		up_write(lock);
		cond_resched();
		block += n;
		count -= n;
	}
	level_update(ov);
	return ret;
}

/*
 * Control
 */

/**
 * nbdcow_overlay_reset() - drop the whole overlay: every block reads the base
 * @ov: the overlay
 *
 * Atomic for whoever reads or writes meanwhile. The memory is back when it
 * returns.
 *
 * Context: process context, sleeps.
 * Return: 0 or -errno with the overlay as before.
 */
int nbdcow_overlay_reset(struct nbdcow_overlay *ov)
{
	struct nbdcow_layer *old, *new;
	struct mem_cgroup *old_memcg;
	char *error;

	mutex_lock(&ov->mutex);
	old = layer_of(ov);
	old_memcg = set_active_memcg(ov->memcg);
	new = layer_create(old->map->nr_blocks, ov->tmpfs_dir, &error);
	set_active_memcg(old_memcg);
	if (IS_ERR(new)) {
		mutex_unlock(&ov->mutex);
		DMERR("%s: reset failed: %s", dm_device_name(ov->md), error);
		return PTR_ERR(new);
	}
	lock_all_shards(ov);
	rcu_assign_pointer(ov->layer, new);
	unlock_all_shards(ov);
	WRITE_ONCE(ov->store_full, false);
	mutex_unlock(&ov->mutex);

	synchronize_rcu();
	layer_destroy(old);
	level_update(ov);
	return 0;
}

/* Make room for a longer device. Existing blocks keep their state. */
static int overlay_grow(struct nbdcow_overlay *ov, u64 nr_blocks)
{
	struct nbdcow_layer *old, *new = kzalloc(sizeof(*new), GFP_KERNEL_ACCOUNT);

	if (new)
		new->map = nbdcow_map_create(nr_blocks);
	if (!new || !new->map) {
		kfree(new);
		return -ENOMEM;
	}

	mutex_lock(&ov->mutex);
	lock_all_shards(ov);
	old = layer_of(ov);
	nbdcow_map_take_over(new->map, old->map);
	new->file = old->file;
	atomic_long_set(&new->used, atomic_long_read(&old->used));
	rcu_assign_pointer(ov->layer, new);
	unlock_all_shards(ov);
	mutex_unlock(&ov->mutex);

	synchronize_rcu();
	kvfree(old->map);
	kfree(old);
	return 0;
}

/**
 * nbdcow_overlay_set_limit() - change the most blocks that may be stored
 * @ov: the overlay
 * @limit: blocks, or NBDCOW_NO_LIMIT; may be below what is stored already
 *
 * Context: any.
 */
void nbdcow_overlay_set_limit(struct nbdcow_overlay *ov, unsigned long limit)
{
	WRITE_ONCE(ov->limit, limit);
	level_update(ov);
}

/**
 * nbdcow_overlay_set_event() - choose the table that device-mapper events go to
 * @ov: the overlay
 * @ti: a target of that table
 * @on: false to stop sending events to @ti's table
 *
 * Context: process context, sleeps.
 */
void nbdcow_overlay_set_event(struct nbdcow_overlay *ov, struct dm_target *ti,
			      bool on)
{
	mutex_lock(&ov->mutex);
	if (on)
		ov->event_ti = ti;
	else if (ov->event_ti == ti)
		ov->event_ti = NULL;
	mutex_unlock(&ov->mutex);
}

static void overlay_free(struct nbdcow_overlay *ov)
{
	cancel_work_sync(&ov->event_work);
	layer_destroy(rcu_dereference_protected(ov->layer, 1));
	mem_cgroup_put(ov->memcg);
	kfree(ov->tmpfs_dir);
	kfree(ov);
}

static struct nbdcow_overlay *overlay_create(u64 nr_blocks,
					     const char *tmpfs_dir, char **error)
{
	struct nbdcow_overlay *ov = kzalloc(sizeof(*ov), GFP_KERNEL_ACCOUNT);
	struct nbdcow_layer *layer;
	int i;

	*error = "Not enough memory for the overlay";
	if (!ov)
		return ERR_PTR(-ENOMEM);
	for (i = 0; i < NBDCOW_SHARDS; i++)
		init_rwsem(&ov->shards[i].lock);
	mutex_init(&ov->mutex);
	kref_init(&ov->kref);
	INIT_WORK(&ov->event_work, event_work);
	ov->limit = NBDCOW_NO_LIMIT;
	if (tmpfs_dir) {
		ov->tmpfs_dir = kstrdup(tmpfs_dir, GFP_KERNEL_ACCOUNT);
		if (!ov->tmpfs_dir) {
			kfree(ov);
			return ERR_PTR(-ENOMEM);
		}
	}
	layer = layer_create(nr_blocks, tmpfs_dir, error);
	if (IS_ERR(layer)) {
		kfree(ov->tmpfs_dir);
		kfree(ov);
		return ERR_CAST(layer);
	}
	rcu_assign_pointer(ov->layer, layer);
	ov->memcg = get_mem_cgroup_from_mm(current->mm);
	return ov;
}

/* Can a table of @nr_blocks with @tmpfs_dir take this live overlay over? */
static int overlay_adopt(struct nbdcow_overlay *ov, u64 nr_blocks,
			 const char *tmpfs_dir, char **error)
{
	u64 old_blocks;
	bool fits = true;

	if (!!tmpfs_dir != !!ov->tmpfs_dir ||
	    (tmpfs_dir && strcmp(tmpfs_dir, ov->tmpfs_dir))) {
		*error = "tmpfs cannot change while the overlay lives";
		return -EINVAL;
	}

	mutex_lock(&ov->mutex);
	old_blocks = layer_of(ov)->map->nr_blocks;
	if (nr_blocks < old_blocks) {
		rcu_read_lock();
		fits = nbdcow_map_is_uniform(rcu_dereference(ov->layer)->map,
					     nr_blocks, old_blocks - nr_blocks,
					     NBDCOW_BASE);
		rcu_read_unlock();
	}
	mutex_unlock(&ov->mutex);

	if (!fits) {
		*error = "Table is shorter than the changes that the overlay holds";
		return -EINVAL;
	}
	if (nr_blocks > old_blocks && overlay_grow(ov, nr_blocks)) {
		*error = "Not enough memory for the block-state map";
		return -ENOMEM;
	}
	return 0;
}

/**
 * nbdcow_overlay_get() - the overlay of a target: the device's, or a new one
 * @ti: the target; its mapped device and start are the overlay's key
 * @tmpfs_dir: where to store blocks, or NULL for the kernel's own tmpfs
 * @error: set to a message when it fails
 *
 * Context: process context of whoever loads the table, sleeps.
 * Return: a referenced overlay or an ERR_PTR.
 */
struct nbdcow_overlay *nbdcow_overlay_get(struct dm_target *ti,
					  const char *tmpfs_dir, char **error)
{
	u64 nr_blocks = DIV_ROUND_UP_ULL(ti->len, NBDCOW_BLOCK_SECTORS);
	struct mapped_device *md = dm_table_get_md(ti->table);
	struct nbdcow_overlay *ov;
	int ret;

	mutex_lock(&overlays_mutex);
	list_for_each_entry(ov, &overlays, list) {
		if (ov->md != md || ov->begin != ti->begin)
			continue;
		ret = overlay_adopt(ov, nr_blocks, tmpfs_dir, error);
		if (ret)
			ov = ERR_PTR(ret);
		else
			kref_get(&ov->kref);
		goto out;
	}

	ov = overlay_create(nr_blocks, tmpfs_dir, error);
	if (!IS_ERR(ov)) {
		ov->md = md;
		ov->begin = ti->begin;
		list_add(&ov->list, &overlays);
	}
out:
	mutex_unlock(&overlays_mutex);
	return ov;
}

static void overlay_release(struct kref *kref)
{
	struct nbdcow_overlay *ov =
		container_of(kref, struct nbdcow_overlay, kref);

	list_del(&ov->list);
}

/**
 * nbdcow_overlay_put() - drop a table's reference; the last one frees it all
 * @ov: the overlay
 *
 * Context: process context, sleeps; no I/O of the table is in flight.
 */
void nbdcow_overlay_put(struct nbdcow_overlay *ov)
{
	bool last;

	mutex_lock(&overlays_mutex);
	last = kref_put(&ov->kref, overlay_release);
	mutex_unlock(&overlays_mutex);
	if (last)
		overlay_free(ov);
}

// SPDX-License-Identifier: GPL-2.0-only
/*
 * The overlay: installs, reads, zeroes and drops blocks, and keeps the limits.
 * The locking rules are in the design comment of dm-nbdcow-target.c.
 */
#include <linux/memcontrol.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/wait_bit.h>

#include "compat.h"
#include "nbdcow.h"

#define DM_MSG_PREFIX "nbdcow"

/* How long a request without memory tries again, and how often. */
#define NBDCOW_NOMEM_PATIENCE	(HZ / 2)
#define NBDCOW_NOMEM_PAUSE	(HZ / 50 + 1)

/* The most that is copied before others get the CPU; bios of large pages have more. */
#define NBDCOW_COPY_BYTES	SZ_1M

/* How long the base may fail and come back before user space is told. */
#define NBDCOW_EVENT_PAUSE	(HZ / 4)

/* The most blocks that all overlays together may store, and do store. */
unsigned long nbdcow_total_limit;
atomic_long_t nbdcow_total_used;

static DEFINE_MUTEX(overlays_mutex);
static LIST_HEAD(overlays);

static struct rw_semaphore *shard_lock(struct nbdcow_overlay *ov, u64 block)
{
	return &ov->shards[nbdcow_leaf_index(block) % NBDCOW_SHARDS].lock;
}

/* By 2 MiB, since on some tmpfs mounts that is what one page holds. */
static struct mutex *installer_lock(struct nbdcow_overlay *ov, u64 block)
{
	return &ov->installers[block / NBDCOW_HUGE_BLOCKS % NBDCOW_INSTALLERS];
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

static void layer_release(struct kref *kref)
{
	layer_destroy(container_of(kref, struct nbdcow_layer, kref));
}

/* Drop a reference. The layer cannot be seen any more by who had it. */
static void layer_put(struct nbdcow_layer *layer)
{
	kref_put(&layer->kref, layer_release);
}

static void layer_work(struct work_struct *work)
{
	struct nbdcow_layer *layer =
		container_of(to_rcu_work(work), struct nbdcow_layer, work);
	struct nbdcow_overlay *ov = layer->overlay;

	layer_put(layer);
	if (atomic_dec_and_test(&ov->dying))
		wake_up_var(&ov->dying);	/* ov may be gone: only a key */
}

static void wait_for_dying(struct nbdcow_overlay *ov)
{
	wait_var_event(&ov->dying, !atomic_read(&ov->dying));
}

/* A layer around an empty @file, which it takes over, also when it fails. */
static struct nbdcow_layer *layer_create(u64 nr_blocks, struct file *file,
					 gfp_t gfp)
{
	struct nbdcow_layer *layer;

	if (IS_ERR(file))
		return ERR_CAST(file);
	layer = kzalloc(sizeof(*layer), gfp);
	if (!layer) {
		nbdcow_store_destroy(file);
		return ERR_PTR(-ENOMEM);
	}
	kref_init(&layer->kref);
	layer->file = file;
	layer->map = nbdcow_map_create(nr_blocks, gfp);
	if (!layer->map) {
		layer_destroy(layer);
		return ERR_PTR(-ENOMEM);
	}
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

/**
 * nbdcow_overlay_event() - let `dmsetup wait' of the overlay's device return soon
 * @ov: the overlay
 *
 * What happens often is told only now and then, but the last time always.
 *
 * Context: any.
 */
void nbdcow_overlay_event(struct nbdcow_overlay *ov)
{
	queue_delayed_work(nbdcow_long_wq, &ov->event_work, NBDCOW_EVENT_PAUSE);
}

/* Note the level, and tell user space when it rose. */
static void level_update(struct nbdcow_overlay *ov)
{
	int old = atomic_read(&ov->level), new;

	do {
		new = nbdcow_overlay_level(ov);
		if (new == old)
			return;
	} while (!atomic_try_cmpxchg(&ov->level, &old, new));

	if (new > old)
		mod_delayed_work(nbdcow_long_wq, &ov->event_work, 0);
}

static void event_work(struct work_struct *work)
{
	struct nbdcow_overlay *ov =
		container_of(to_delayed_work(work), struct nbdcow_overlay, event_work);

	mutex_lock(&ov->mutex);
	if (ov->event_ti)
		dm_table_event(ov->event_ti->table);
	mutex_unlock(&ov->mutex);
}

/**
 * nbdcow_overlay_set_total() - change the most that all overlays may store
 * @blocks: blocks, or NBDCOW_NO_LIMIT; may be below what is stored already
 *
 * Context: process context, sleeps.
 */
void nbdcow_overlay_set_total(unsigned long blocks)
{
	struct nbdcow_overlay *ov;

	mutex_lock(&overlays_mutex);
	WRITE_ONCE(nbdcow_total_limit, blocks);
	list_for_each_entry(ov, &overlays, list)
		level_update(ov);
	mutex_unlock(&overlays_mutex);
}

/* Add one unless that exceeds the limit. */
static bool add_below(atomic_long_t *counter, unsigned long limit)
{
	long value = atomic_long_read(counter);

	do {
		if (value >= limit)
			return false;
	} while (!atomic_long_try_cmpxchg(counter, &value, value + 1));
	return true;
}

static bool reserve_block(struct nbdcow_overlay *ov, struct nbdcow_layer *layer)
{
	long used, peak;

	if (!add_below(&layer->used, READ_ONCE(ov->limit)))
		return false;
	if (!add_below(&nbdcow_total_used, READ_ONCE(nbdcow_total_limit))) {
		atomic_long_dec(&layer->used);
		return false;
	}
	used = atomic_long_read(&layer->used);
	peak = atomic_long_read(&ov->peak);
	while (used > peak &&
	       !atomic_long_try_cmpxchg(&ov->peak, &peak, used))
		;
	return true;
}

static void unreserve_blocks(struct nbdcow_layer *layer, unsigned long blocks)
{
	atomic_long_sub(blocks, &layer->used);
	atomic_long_sub(blocks, &nbdcow_total_used);
}

/* A new block was refused for good: over a limit (-EDQUOT) or no page for it. */
static void note_refused(struct nbdcow_overlay *ov, int error)
{
	if (error != -EDQUOT)
		WRITE_ONCE(ov->store_full, true);
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

/**
 * nbdcow_overlay_block() - the state of one block
 * @ov: the overlay
 * @block: the block
 *
 * Context: any, does not sleep.
 * Return: the state, which may be outdated at once.
 */
enum nbdcow_state nbdcow_overlay_block(struct nbdcow_overlay *ov, u64 block)
{
	enum nbdcow_state state;

	rcu_read_lock();
	state = nbdcow_map_state(rcu_dereference(ov->layer)->map, block);
	rcu_read_unlock();
	return state;
}

/* Is it worth another try, of what was tried since @start first? Not in map(). */
static bool wait_for_memory(int ret, unsigned long start)
{
	if (ret != -ENOMEM || !time_before(jiffies, start + NBDCOW_NOMEM_PATIENCE))
		return false;
	/* kswapd can do what GFP_NOIO cannot: swap out. */
	schedule_timeout_uninterruptible(NBDCOW_NOMEM_PAUSE);
	return true;
}

/* Does the view need the block as it is? Under RCU or the block's shard lock. */
static bool view_needs(struct nbdcow_view *view, struct nbdcow_layer *layer,
		       u64 block)
{
	/* Pairs with the release in nbdcow_view_freeze(): states are there. */
	return smp_load_acquire(&view->layer) == layer &&
	       !READ_ONCE(view->failed) &&
	       nbdcow_map_state(view->states, block) == NBDCOW_OVERLAY &&
	       nbdcow_map_state(view->saved, block) != NBDCOW_OVERLAY;
}

/* Does any view need the block as it is? Likewise. */
static bool is_viewed(struct nbdcow_overlay *ov, struct nbdcow_layer *layer,
		      u64 block)
{
	struct nbdcow_view *view;
	bool needed = false;

	if (likely(list_empty(&ov->views)))
		return false;
	rcu_read_lock();
	list_for_each_entry_rcu(view, &ov->views, list) {
		needed = view_needs(view, layer, block);
		if (needed)
			break;
	}
	rcu_read_unlock();
	return needed;
}

/* Read a block from the page that was found for it, if it is stored, and there. */
static bool read_found(struct nbdcow_layer *layer, struct nbdcow_piece *piece,
		       struct page *page)
{
	if (nbdcow_map_state(layer->map, piece->block) != NBDCOW_OVERLAY ||
	    !nbdcow_store_has(layer->file, page))
		return false;
	nbdcow_copy_from_page(piece, page);
	return true;
}

/* Rewrite a block in the page found for it, if that can be locked and no view needs it. */
static bool rewrite_found(struct nbdcow_overlay *ov, struct nbdcow_layer *layer,
			  struct nbdcow_piece *piece, struct page *page)
{
	bool ok;

	if (!nbdcow_store_lock(layer->file, page, true))
		return false;
	ok = nbdcow_map_state(layer->map, piece->block) == NBDCOW_OVERLAY &&
	     !is_viewed(ov, layer, piece->block);
	if (ok) {
		nbdcow_copy_to_page(piece, page);
		if (!PageDirty(page))
			set_page_dirty(page);
	}
	unlock_page(page);
	return ok;
}

/**
 * nbdcow_overlay_copy() - read or rewrite stored blocks one after the other
 * @ov: the overlay
 * @piece: the first block's; stands behind what was copied afterwards
 * @bytes: how many bytes of the bio to copy at most
 *
 * For the common case: it takes no lock but the page's, to write, waits for
 * nothing, and ends at a block that is not stored, not in memory, or not to be
 * locked at once. The page comes first and the state second; why that will do is
 * in dm-nbdcow-target.c.
 *
 * Context: process context, not atomic: lets others run now and then.
 * Return: number of bytes copied.
 */
unsigned int nbdcow_overlay_copy(struct nbdcow_overlay *ov,
				 struct nbdcow_piece *piece, unsigned int bytes)
{
	bool write = op_is_write(bio_op(piece->bio)), ok;
	unsigned int most = min_t(unsigned int, bytes, NBDCOW_COPY_BYTES), left = most;
	struct nbdcow_layer *layer;
	struct nbdcow_walk walk;
	struct page *page;

	rcu_read_lock();
	layer = rcu_dereference(ov->layer);
	nbdcow_store_walk_begin(&walk, layer->file);
	while (left) {
		piece->bytes = min(NBDCOW_BLOCK_BYTES - piece->offset, left);
		page = nbdcow_store_walk(&walk, layer->file, piece->block);
		if (!page)
			break;
		ok = write ? rewrite_found(ov, layer, piece, page) :
			     read_found(layer, piece, page);
		put_page(page);
		if (unlikely(!ok))
			break;
		left -= piece->bytes;
		piece->block++;
		piece->offset = 0;
	}
	nbdcow_store_walk_end(&walk);
	rcu_read_unlock();
	if (unlikely(most < bytes))
		cond_resched();
	return most - left;
}

static bool lock_shard_read(struct nbdcow_overlay *ov,
			    struct nbdcow_piece *piece)
{
	struct rw_semaphore *lock = shard_lock(ov, piece->block);

	if (piece->context == NBDCOW_NOWAIT)
		return down_read_trylock(lock);
	down_read(lock);
	return true;
}

/* The page of a block whose state is OVERLAY, locked. */
static struct page *get_stored(struct nbdcow_overlay *ov,
			       struct nbdcow_layer *layer,
			       struct nbdcow_piece *piece)
{
	struct mem_cgroup *old_memcg = set_active_memcg(ov->memcg);
	struct page *page = nbdcow_store_get_locked(layer->file, piece->block,
						    piece->context, true);

	set_active_memcg(old_memcg);
	return page;
}

/**
 * nbdcow_overlay_read() - read bytes of a stored block
 * @ov: the overlay
 * @piece: which bytes; its iterator is advanced on success
 *
 * Context: process context; sleeps as the piece's context allows.
 * Return: 0; -ESTALE if the block is not in state OVERLAY any more; -EAGAIN in
 *	NBDCOW_NOWAIT; -EINPROGRESS if only NBDCOW_WORK can go on; there -EIO or
 *	-ENOMEM from swapping in.
 */
int nbdcow_overlay_read(struct nbdcow_overlay *ov, struct nbdcow_piece *piece)
{
	struct nbdcow_layer *layer;
	struct page *page;
	int ret = 0;

	if (!lock_shard_read(ov, piece))
		return -EAGAIN;
	layer = layer_of(ov);
	if (nbdcow_map_state(layer->map, piece->block) != NBDCOW_OVERLAY) {
		ret = -ESTALE;
		goto out;
	}
	page = get_stored(ov, layer, piece);
	if (IS_ERR(page)) {
		ret = PTR_ERR(page);
		goto out;
	}
	nbdcow_copy_from_page(piece, page);
	unlock_page(page);
	put_page(page);
out:
	up_read(shard_lock(ov, piece->block));
	return ret;
}

/* Keep a block, which is stored, for a view as it is. */
static int save_block(struct nbdcow_view *view, u64 block,
		      enum nbdcow_context context)
{
	gfp_t gfp = nbdcow_gfp(context) | __GFP_ACCOUNT;
	struct page *from, *to;
	int ret;

	if (!add_below(&nbdcow_total_used, READ_ONCE(nbdcow_total_limit)))
		return -EDQUOT;
	ret = nbdcow_map_prepare(view->saved, block, gfp);
	if (ret)
		goto bad;
	from = nbdcow_store_get_locked(view->layer->file, block, context, true);
	if (IS_ERR(from)) {
		ret = PTR_ERR(from);
		goto bad;
	}
	to = nbdcow_store_new(view->file, block, context);
	if (IS_ERR(to)) {
		ret = PTR_ERR(to);
		goto bad_from;
	}
	nbdcow_copy_block(to, from, block);
	nbdcow_store_filled(to, block);
	atomic_long_inc(&view->nr_saved);
	/* Before the block's page is unlocked: nobody may change it earlier. */
	nbdcow_map_change(view->saved, block, 1, NBDCOW_OVERLAY);
	unlock_page(to);
	put_page(to);
	unlock_page(from);
	put_page(from);
	return 0;

bad_from:
	unlock_page(from);
	put_page(from);
bad:
	atomic_long_dec(&nbdcow_total_used);
	return ret;
}

/*
 * Before a block that is stored changes, keep it for the views that need it. A
 * view for which that cannot be done is lost; the change is not. Returns 0, and
 * elsewhere than in NBDCOW_WORK -EAGAIN and -EINPROGRESS as for a write.
 */
static int save_for_views(struct nbdcow_overlay *ov, struct nbdcow_layer *layer,
			  u64 block, enum nbdcow_context context)
{
	struct mutex *lock = installer_lock(ov, block);
	struct mem_cgroup *old_memcg;
	struct nbdcow_view *view;
	unsigned long start;
	int ret = 0;

	if (likely(!is_viewed(ov, layer, block)))
		return 0;
	if (context != NBDCOW_NOWAIT)
		mutex_lock(lock);
	else if (!mutex_trylock(lock))
		return -EAGAIN;

	old_memcg = set_active_memcg(ov->memcg);
	list_for_each_entry(view, &ov->views, list) {
		if (!view_needs(view, layer, block))
			continue;
		start = jiffies;
		do {
			ret = save_block(view, block, context);
		} while (context == NBDCOW_WORK && wait_for_memory(ret, start));
		if (!ret)
			continue;
		if (context != NBDCOW_WORK) {
			if (context == NBDCOW_MAP)
				ret = -EINPROGRESS;
			else if (ret != -EINPROGRESS)
				ret = -EAGAIN;
			break;
		}
		WRITE_ONCE(view->failed, true);
		DMWARN_LIMIT("%s: a view is lost: cannot keep a block for it (error %d)",
			     dm_device_name(ov->md), ret);
		ret = 0;
	}
	set_active_memcg(old_memcg);
	mutex_unlock(lock);
	return ret;
}

/* Before stored blocks of a leaf go; under their shard lock. */
static void save_range(struct nbdcow_overlay *ov, u64 block, u64 count)
{
	struct nbdcow_layer *layer = layer_of(ov);
	u64 run;

	for (; count && !list_empty(&ov->views); count -= run, block += run) {
		run = 1;
		if (nbdcow_map_state(layer->map, block) == NBDCOW_OVERLAY)
			save_for_views(ov, layer, block, NBDCOW_WORK);
		else
			nbdcow_map_run(layer->map, block, count, &run);
		cond_resched();
	}
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
	nbdcow_store_filled(page, piece->block);
	if (state != NBDCOW_OVERLAY)
		nbdcow_map_change(layer->map, piece->block, 1, NBDCOW_OVERLAY);
}

static int rewrite_block(struct nbdcow_overlay *ov, struct nbdcow_layer *layer,
			 struct nbdcow_piece *piece)
{
	struct page *page;
	int ret;

	ret = save_for_views(ov, layer, piece->block, piece->context);
	if (ret)
		return ret;
	page = get_stored(ov, layer, piece);
	if (IS_ERR(page))
		return PTR_ERR(page);
	fill_and_publish(layer, piece, page, NBDCOW_OVERLAY);
	unlock_page(page);
	put_page(page);
	return 0;
}

/* Make room for a new block in the limits and in the map, and get its page. */
static struct page *get_new(struct nbdcow_overlay *ov,
			    struct nbdcow_layer *layer,
			    struct nbdcow_piece *piece)
{
	gfp_t gfp = nbdcow_gfp(piece->context) | __GFP_ACCOUNT;
	struct mem_cgroup *old_memcg;
	struct page *page;

	piece->new_block = true;
	if (!reserve_block(ov, layer))
		return ERR_PTR(-EDQUOT);

	old_memcg = set_active_memcg(ov->memcg);
	if (nbdcow_map_prepare(layer->map, piece->block, gfp))
		page = ERR_PTR(-ENOMEM);
	else
		page = nbdcow_store_new(layer->file, piece->block,
					piece->context);
	set_active_memcg(old_memcg);
	/* a quota of the tmpfs, not a limit of ours */
	if (page == ERR_PTR(-EDQUOT))
		page = ERR_PTR(-ENOSPC);
	if (IS_ERR(page))
		unreserve_blocks(layer, 1);
	return page;
}

/* Install a block that was not stored a moment ago. */
static int install_block(struct nbdcow_overlay *ov, struct nbdcow_layer *layer,
			 struct nbdcow_piece *piece)
{
	struct mutex *lock = installer_lock(ov, piece->block);
	enum nbdcow_state state;
	struct page *page;
	int ret = 0;

	if (piece->context != NBDCOW_NOWAIT)
		mutex_lock(lock);
	else if (!mutex_trylock(lock))
		return -EAGAIN;

	state = nbdcow_map_state(layer->map, piece->block);
	if (state == NBDCOW_OVERLAY) {	/* another installer was faster */
		mutex_unlock(lock);
		return rewrite_block(ov, layer, piece);
	}
	page = get_new(ov, layer, piece);
	if (IS_ERR(page)) {
		ret = PTR_ERR(page);
	} else {
		fill_and_publish(layer, piece, page, state);
		unlock_page(page);
		put_page(page);
		if (unlikely(READ_ONCE(ov->store_full)))
			WRITE_ONCE(ov->store_full, false);
	}
	mutex_unlock(lock);
	return ret;
}

static int __overlay_write(struct nbdcow_overlay *ov, struct nbdcow_piece *piece)
{
	struct nbdcow_layer *layer = layer_of(ov);
	enum nbdcow_state state;
	bool zero;

	lockdep_assert_held_read(shard_lock(ov, piece->block));

	state = nbdcow_map_state(layer->map, piece->block);
	if (state == NBDCOW_OVERLAY)
		return rewrite_block(ov, layer, piece);

	zero = state == NBDCOW_ZERO || piece->base_is_zero;
	if (zero && bio_op(piece->bio) == REQ_OP_WRITE_ZEROES) {
		bio_advance_iter(piece->bio, &piece->iter, piece->bytes);
		return 0;
	}
	if (!zero && piece->bytes < NBDCOW_BLOCK_BYTES && !piece->base)
		return -ENODATA;
	return install_block(ov, layer, piece);
}

/**
 * nbdcow_overlay_write() - write bytes of one block to the overlay
 * @ov: the overlay
 * @piece: which bytes; its iterator is advanced on success
 *
 * On an error the block reads as before.
 *
 * Context: process context; sleeps as the piece's context allows; GFP_NOIO.
 * Return: 0; -ENODATA if the block is in state BASE, the piece covers only a
 *	part of it and does not bring the base's content; -ENOSPC over a limit
 *	or on a full tmpfs; -EAGAIN in NBDCOW_NOWAIT for that and whatever would
 *	sleep; -EINPROGRESS if only NBDCOW_WORK can go on; there -ENOMEM, and
 *	-EIO from swap.
 */
int nbdcow_overlay_write(struct nbdcow_overlay *ov, struct nbdcow_piece *piece)
{
	int ret;

	if (!lock_shard_read(ov, piece))
		return -EAGAIN;
	ret = __overlay_write(ov, piece);
	up_read(shard_lock(ov, piece->block));

	switch (ret) {
	case 0:
		level_update(ov);
		return 0;
	case -EDQUOT:
	case -ENOSPC:
		if (piece->context == NBDCOW_NOWAIT)
			return -EAGAIN;
		note_refused(ov, ret);
		return -ENOSPC;
	case -ENOMEM:
		if (piece->context == NBDCOW_NOWAIT)
			return -EAGAIN;
		return piece->context == NBDCOW_MAP ? -EINPROGRESS : -ENOMEM;
	default:
		return ret;
	}
}

/**
 * nbdcow_overlay_wait() - read or write in NBDCOW_WORK, with patience for memory
 * @ov: the overlay
 * @piece: which bytes
 * @action: nbdcow_overlay_read() or nbdcow_overlay_write()
 *
 * After one request has waited in vain for a new block, others that want one do not
 * wait until one could be stored.
 *
 * Context: process context, not in map(); sleeps.
 * Return: as @action.
 */
int nbdcow_overlay_wait(struct nbdcow_overlay *ov, struct nbdcow_piece *piece,
			int (*action)(struct nbdcow_overlay *ov,
				      struct nbdcow_piece *piece))
{
	unsigned long start = jiffies;
	int ret;

	piece->context = NBDCOW_WORK;
	do {
		piece->new_block = false;
		ret = action(ov, piece);
	} while (!(piece->new_block && READ_ONCE(ov->store_full)) &&
		 wait_for_memory(ret, start));
	if (ret == -ENOMEM && piece->new_block)
		note_refused(ov, ret);
	return ret;
}

static bool stores_none(const struct nbdcow_map *map, u64 block, u64 end)
{
	u64 run;

	for (; block < end; block += run)
		if (nbdcow_map_run(map, block, end - block, &run) == NBDCOW_OVERLAY)
			return false;
	return true;
}

/*
 * Free the pages of blocks that are not stored any more. Pages may be larger than
 * a block, and punching a part of one leaves the rest, so the last block of such a
 * range takes all of it along.
 */
static void punch_blocks(struct nbdcow_layer *layer, u64 block, unsigned long count)
{
	static const u64 units[] = {
		PAGE_SIZE / NBDCOW_BLOCK_BYTES, NBDCOW_HUGE_BLOCKS
	};
	const struct nbdcow_map *map = layer->map;
	u64 end = block + count, first, last;
	int i;

	for (i = 0; i < ARRAY_SIZE(units); i++) {
		first = round_down(block, units[i]);
		last = round_up(end, units[i]);
		if (stores_none(map, first, block))
			block = first;
		if (stores_none(map, end, min(last, map->nr_blocks)))
			end = last;
	}
	nbdcow_store_punch(layer->file, block, end - block);
}

/* Zero blocks of one leaf. */
static int __zero_leaf(struct nbdcow_overlay *ov, u64 block, unsigned long count)
{
	struct nbdcow_layer *layer = layer_of(ov);
	unsigned long stored;
	int ret;

	lockdep_assert_held_write(shard_lock(ov, block));

	if (nbdcow_map_is_uniform(layer->map, block, count, NBDCOW_ZERO))
		return 0;
	save_range(ov, block, count);

	if (count == NBDCOW_LEAF_BLOCKS) {
		stored = nbdcow_map_zero_leaf(layer->map, block);
	} else {
		/* Must work in a full memory cgroup too: it frees memory. */
		ret = nbdcow_map_prepare(layer->map, block,
					 nbdcow_gfp(NBDCOW_WORK) | __GFP_ACCOUNT);
		if (ret)
			ret = nbdcow_map_prepare(layer->map, block,
						 nbdcow_gfp(NBDCOW_WORK));
		if (ret)
			return ret;
		stored = nbdcow_map_change(layer->map, block, count, NBDCOW_ZERO);
	}

	/* The state first: nobody may look for a page that is going. */
	if (stored) {
		punch_blocks(layer, block, count);
		unreserve_blocks(layer, stored);
		WRITE_ONCE(ov->store_full, false);
	}
	return 0;
}

/**
 * nbdcow_overlay_zero() - make whole blocks read as zeroes, free their pages
 * @ov: the overlay
 * @block: first block
 * @count: number of blocks
 *
 * Works when the overlay is full.
 *
 * Context: process context, not in map(); sleeps.
 * Return: 0; -ENOMEM when not even a leaf of the map can be had, with the
 *	blocks of that leaf as before.
 */
int nbdcow_overlay_zero(struct nbdcow_overlay *ov, u64 block, u64 count)
{
	struct mem_cgroup *old_memcg = set_active_memcg(ov->memcg);
	unsigned long start = jiffies;
	int ret = 0;

	while (count && !ret) {
		unsigned long n = nbdcow_leaf_span(block, count);
		struct rw_semaphore *lock = shard_lock(ov, block);

		/* Most of it while others can still read and install. */
		if (unlikely(!list_empty(&ov->views))) {
			down_read(lock);
			save_range(ov, block, n);
			up_read(lock);
		}
		do {
			down_write(lock);
			ret = __zero_leaf(ov, block, n);
			up_write(lock);
		} while (wait_for_memory(ret, start));
		cond_resched();
		block += n;
		count -= n;
	}
	set_active_memcg(old_memcg);
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
 * Each block that is read or written meanwhile is seen either as it was or
 * reset. What was stored is freed in the background, or with the last view of it;
 * the next reset waits for that.
 *
 * Context: process context, sleeps.
 * Return: 0 or -errno with the overlay as before.
 */
int nbdcow_overlay_reset(struct nbdcow_overlay *ov)
{
	struct nbdcow_layer *old, *new;
	unsigned int noio;

	wait_for_dying(ov);
	mutex_lock(&ov->mutex);
	old = layer_of(ov);
	/* A suspend may be waiting for this message while I/O waits for it. */
	noio = memalloc_noio_save();
	/* Charged to nobody: the owner's memory cgroup may be full. */
	new = layer_create(old->map->nr_blocks, nbdcow_store_another(old->file),
			   GFP_KERNEL);
	memalloc_noio_restore(noio);
	if (IS_ERR(new)) {
		mutex_unlock(&ov->mutex);
		return PTR_ERR(new);
	}
	lock_all_shards(ov);
	rcu_assign_pointer(ov->layer, new);
	unlock_all_shards(ov);
	WRITE_ONCE(ov->store_full, false);
	/* What is about to be freed is in nobody's way. */
	if (list_empty(&ov->views))
		unreserve_blocks(old, atomic_long_read(&old->used));
	old->overlay = ov;
	atomic_inc(&ov->dying);
	INIT_RCU_WORK(&old->work, layer_work);
	queue_rcu_work(nbdcow_long_wq, &old->work);
	mutex_unlock(&ov->mutex);
	level_update(ov);
	return 0;
}

/* Make room for a longer device. Existing blocks keep their state. */
static int overlay_grow(struct nbdcow_overlay *ov, u64 nr_blocks)
{
	struct nbdcow_layer *old, *new = kzalloc(sizeof(*new), GFP_KERNEL_ACCOUNT);

	if (new)
		new->map = nbdcow_map_create(nr_blocks, GFP_KERNEL_ACCOUNT);
	if (!new || !new->map) {
		kfree(new);
		return -ENOMEM;
	}
	kref_init(&new->kref);

	mutex_lock(&ov->mutex);
	/* Also a view that is going still has the layer. */
	if (!list_empty(&ov->views) || kref_read(&layer_of(ov)->kref) > 1) {
		mutex_unlock(&ov->mutex);
		kvfree(new->map);
		kfree(new);
		return -EBUSY;
	}
	lock_all_shards(ov);
	old = layer_of(ov);
	nbdcow_map_take_over(new->map, old->map);
	new->file = old->file;
	atomic_long_set(&new->used, atomic_long_read(&old->used));
	rcu_assign_pointer(ov->layer, new);
	/*
	 * Before any change in the new map: a leaf that goes there stays in the
	 * old one, where a reader would still believe in what it says.
	 */
	synchronize_rcu();
	unlock_all_shards(ov);
	mutex_unlock(&ov->mutex);

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

/* Copes with half-built ones. */
static void overlay_free(struct nbdcow_overlay *ov)
{
	cancel_delayed_work_sync(&ov->event_work);
	layer_destroy(rcu_dereference_protected(ov->layer, 1));
	mem_cgroup_put(ov->memcg);
	free_percpu(ov->stats);
	kfree(ov->tmpfs_dir);
	kfree(ov);
}

/* An overlay in an empty @file, which it takes over, also when it fails. */
static struct nbdcow_overlay *overlay_create(u64 nr_blocks, struct file *file,
					     const char *tmpfs_dir)
{
	struct nbdcow_overlay *ov = kzalloc(sizeof(*ov), GFP_KERNEL_ACCOUNT);
	struct nbdcow_layer *layer = layer_create(nr_blocks, file,
						  GFP_KERNEL_ACCOUNT);
	int i;

	if (!ov || IS_ERR(layer)) {
		if (!IS_ERR(layer))
			layer_destroy(layer);
		kfree(ov);
		return ERR_PTR(-ENOMEM);
	}
	rcu_assign_pointer(ov->layer, layer);
	for (i = 0; i < NBDCOW_SHARDS; i++)
		init_rwsem(&ov->shards[i].lock);
	for (i = 0; i < NBDCOW_INSTALLERS; i++)
		mutex_init(&ov->installers[i]);
	mutex_init(&ov->mutex);
	INIT_LIST_HEAD(&ov->views);
	kref_init(&ov->kref);
	INIT_DELAYED_WORK(&ov->event_work, event_work);
	ov->limit = NBDCOW_NO_LIMIT;
	ov->memcg = get_mem_cgroup_from_mm(current->mm);
	ov->stats = alloc_percpu_gfp(struct nbdcow_stats, GFP_KERNEL_ACCOUNT);
	if (tmpfs_dir)
		ov->tmpfs_dir = kstrdup(tmpfs_dir, GFP_KERNEL_ACCOUNT);
	if (!ov->stats || (tmpfs_dir && !ov->tmpfs_dir)) {
		overlay_free(ov);
		return ERR_PTR(-ENOMEM);
	}
	return ov;
}

/*
 * Does a device of this length show all changes? Under the overlay's mutex. What is
 * changed within a block is not known, so none may be that the new end cuts.
 */
static bool overlay_fits(struct nbdcow_overlay *ov, sector_t sectors)
{
	u64 nr_blocks = sectors < ov->length ? nbdcow_block(sectors) :
			DIV_ROUND_UP_ULL(sectors, NBDCOW_BLOCK_SECTORS);
	struct nbdcow_map *map = layer_of(ov)->map;
	bool fits = true;

	if (nr_blocks < map->nr_blocks) {
		rcu_read_lock();
		fits = nbdcow_map_is_uniform(map, nr_blocks,
					     map->nr_blocks - nr_blocks,
					     NBDCOW_BASE);
		rcu_read_unlock();
	}
	return fits;
}

/**
 * nbdcow_overlay_set_length() - a table is about to come into force
 * @ov: the overlay
 * @sectors: the table's length
 *
 * Context: process context, sleeps; nobody changes the overlay.
 * Return: whether a device of this length shows all changes; if not, nothing is set.
 */
bool nbdcow_overlay_set_length(struct nbdcow_overlay *ov, sector_t sectors)
{
	bool fits;

	mutex_lock(&ov->mutex);
	fits = overlay_fits(ov, sectors);
	if (fits)
		ov->length = sectors;
	mutex_unlock(&ov->mutex);
	return fits;
}

/* Can a table of this length take this live overlay over? */
static int overlay_adopt(struct nbdcow_overlay *ov, sector_t sectors,
			 struct block_device *base, const char *tmpfs_dir,
			 char **error)
{
	u64 nr_blocks = DIV_ROUND_UP_ULL(sectors, NBDCOW_BLOCK_SECTORS), old_blocks;
	int ret = 0;
	bool fits;

	if (bdev_nr_sectors(base) < ov->base_sectors) {
		*error = "The base device is smaller than the overlay's base was";
		return -EINVAL;
	}
	if (bdev_logical_block_size(base) > ov->base_sector_bytes) {
		*error = "The base device has larger logical blocks than the overlay's base had";
		return -EINVAL;
	}
	if (!!tmpfs_dir != !!ov->tmpfs_dir ||
	    (tmpfs_dir && strcmp(tmpfs_dir, ov->tmpfs_dir))) {
		*error = "tmpfs cannot change while the overlay lives";
		return -EINVAL;
	}

	mutex_lock(&ov->mutex);
	old_blocks = layer_of(ov)->map->nr_blocks;
	fits = overlay_fits(ov, sectors);
	mutex_unlock(&ov->mutex);

	if (!fits) {
		*error = "Table is shorter than the changes that the overlay holds";
		return -EINVAL;
	}
	if (nr_blocks > old_blocks)
		ret = overlay_grow(ov, nr_blocks);
	if (ret)
		*error = ret == -EBUSY ?
			 "The overlay cannot grow while there is a view of it" :
			 "Not enough memory for the block-state map";
	return ret;
}

/* The overlay of a mapped device, or NULL. Under overlays_mutex. */
static struct nbdcow_overlay *overlay_of(struct mapped_device *md)
{
	struct nbdcow_overlay *ov;

	list_for_each_entry(ov, &overlays, list)
		if (ov->md == md)
			return ov;
	return NULL;
}

/* A new overlay, of which others may know from here on. Under overlays_mutex. */
static struct nbdcow_overlay *overlay_add(struct mapped_device *md, u64 nr_blocks,
					  struct block_device *base,
					  struct file *file,
					  const char *tmpfs_dir)
{
	struct nbdcow_overlay *ov = overlay_create(nr_blocks, file, tmpfs_dir);

	if (IS_ERR(ov))
		return ov;
	ov->md = md;
	ov->base_sectors = bdev_nr_sectors(base);
	ov->base_sector_bytes = bdev_logical_block_size(base);
	ov->tables = 1;
	list_add(&ov->list, &overlays);
	return ov;
}

/**
 * nbdcow_overlay_get() - the overlay of a target: the device's, or a new one
 * @ti: the target; its mapped device is the overlay's key
 * @base: the base device
 * @tmpfs_dir: where to store blocks, or NULL for the kernel's own tmpfs
 * @error: set to a message when it fails
 *
 * Context: process context of whoever loads the table, sleeps.
 * Return: a referenced overlay or an ERR_PTR.
 */
struct nbdcow_overlay *nbdcow_overlay_get(struct dm_target *ti,
					  struct block_device *base,
					  const char *tmpfs_dir, char **error)
{
	u64 nr_blocks = DIV_ROUND_UP_ULL(ti->len, NBDCOW_BLOCK_SECTORS);
	struct mapped_device *md = dm_table_get_md(ti->table);
	struct nbdcow_overlay *ov;
	struct file *file = NULL;
	unsigned int noio;
	int ret;

	mutex_lock(&overlays_mutex);
	ov = overlay_of(md);
	if (!ov) {
		/* A directory may be on a file system that hangs. */
		mutex_unlock(&overlays_mutex);
		file = nbdcow_store_create(tmpfs_dir, error);
		if (IS_ERR(file))
			return ERR_CAST(file);
		mutex_lock(&overlays_mutex);
		ov = overlay_of(md);
	}
	/* Who makes a view of a suspended device may be waiting for the mutex. */
	noio = memalloc_noio_save();
	if (ov) {
		nbdcow_store_destroy(file);
		ret = overlay_adopt(ov, ti->len, base, tmpfs_dir, error);
		if (ret) {
			ov = ERR_PTR(ret);
		} else {
			kref_get(&ov->kref);
			ov->tables++;
		}
	} else {
		*error = "Not enough memory for the overlay";
		ov = overlay_add(md, nr_blocks, base, file, tmpfs_dir);
	}
	memalloc_noio_restore(noio);
	mutex_unlock(&overlays_mutex);
	return ov;
}

static void overlay_release(struct kref *kref)
{
	overlay_free(container_of(kref, struct nbdcow_overlay, kref));
}

/**
 * nbdcow_overlay_put() - drop a table's reference
 * @ov: the overlay; the last table's end is its own, but for views of it
 *
 * Context: process context, sleeps; no I/O of the table is in flight.
 */
void nbdcow_overlay_put(struct nbdcow_overlay *ov)
{
	mutex_lock(&overlays_mutex);
	if (!--ov->tables)
		list_del(&ov->list);
	mutex_unlock(&overlays_mutex);
	wait_for_dying(ov);
	kref_put(&ov->kref, overlay_release);
}

/*
 * Views
 */

static struct nbdcow_overlay *find_overlay(dev_t dev)
{
	struct nbdcow_overlay *ov;

	mutex_lock(&overlays_mutex);
	list_for_each_entry(ov, &overlays, list) {
		if (disk_devt(dm_disk(ov->md)) == dev) {
			kref_get(&ov->kref);
			mutex_unlock(&overlays_mutex);
			return ov;
		}
	}
	mutex_unlock(&overlays_mutex);
	return NULL;
}

/**
 * nbdcow_view_create() - prepare a view of an overlay
 * @dev: the overlay's device
 * @sectors: size of the view, at most the device's
 * @error: set to a message when it fails
 *
 * From here on the overlay cannot grow. The device may go: its overlay stays.
 *
 * Context: process context, sleeps.
 * Return: the view, which shows nothing yet, or an ERR_PTR.
 */
struct nbdcow_view *nbdcow_view_create(dev_t dev, sector_t sectors, char **error)
{
	u64 nr_blocks = DIV_ROUND_UP_ULL(sectors, NBDCOW_BLOCK_SECTORS);
	struct nbdcow_overlay *ov = find_overlay(dev);
	struct nbdcow_layer *layer;
	struct nbdcow_view *view;
	unsigned int noio;
	int ret = -ENOMEM;

	if (!ov) {
		*error = "The device to view has no nbdcow table";
		return ERR_PTR(-EINVAL);
	}
	*error = "Not enough memory for the view";
	view = kzalloc(sizeof(*view), GFP_KERNEL_ACCOUNT);
	if (!view) {
		kref_put(&ov->kref, overlay_release);
		return ERR_PTR(-ENOMEM);
	}
	INIT_LIST_HEAD(&view->list);
	view->overlay = ov;

	mutex_lock(&ov->mutex);
	/* A resume of the device may be waiting for us while I/O waits for it. */
	noio = memalloc_noio_save();
	layer = layer_of(ov);
	if (nr_blocks > layer->map->nr_blocks) {
		*error = "The view is longer than the device";
		ret = -EINVAL;
		goto bad;
	}
	nr_blocks = layer->map->nr_blocks;
	view->states = nbdcow_map_create(nr_blocks, GFP_KERNEL_ACCOUNT);
	view->saved = nbdcow_map_create(nr_blocks, GFP_KERNEL_ACCOUNT);
	if (!view->states || !view->saved)
		goto bad;
	view->file = nbdcow_store_another(layer->file);
	if (IS_ERR(view->file)) {
		*error = "Cannot create the view's file";
		ret = PTR_ERR(view->file);
		view->file = NULL;
		goto bad;
	}
	lock_all_shards(ov);
	list_add_rcu(&view->list, &ov->views);
	unlock_all_shards(ov);
	memalloc_noio_restore(noio);
	mutex_unlock(&ov->mutex);
	return view;

bad:
	memalloc_noio_restore(noio);
	mutex_unlock(&ov->mutex);
	nbdcow_view_destroy(view);
	return ERR_PTR(ret);
}

/**
 * nbdcow_view_destroy() - drop a view and all that was saved for it
 * @view: the view, maybe half-built; nobody reads it any more
 *
 * Context: process context, sleeps.
 */
void nbdcow_view_destroy(struct nbdcow_view *view)
{
	struct nbdcow_overlay *ov = view->overlay;

	mutex_lock(&ov->mutex);
	lock_all_shards(ov);
	list_del_rcu(&view->list);
	unlock_all_shards(ov);
	mutex_unlock(&ov->mutex);

	synchronize_rcu();
	nbdcow_store_destroy(view->file);
	nbdcow_map_destroy(view->states);
	nbdcow_map_destroy(view->saved);
	atomic_long_sub(atomic_long_read(&view->nr_saved), &nbdcow_total_used);
	if (view->layer)
		layer_put(view->layer);
	kref_put(&ov->kref, overlay_release);
	kfree(view);
}

/**
 * nbdcow_view_freeze() - make this the instant that a view shows, if there is none
 * @view: the view
 *
 * The overlay's device may be in use, or suspended.
 *
 * Context: process context, sleeps, also while pages come back from swap.
 * Return: 0 or -ENOMEM, after which it can be called again.
 */
int nbdcow_view_freeze(struct nbdcow_view *view)
{
	gfp_t gfp = nbdcow_gfp(NBDCOW_WORK) | __GFP_ACCOUNT;
	struct nbdcow_overlay *ov = view->overlay;
	struct mem_cgroup *old_memcg;
	struct nbdcow_layer *layer;
	int ret = 0;

	mutex_lock(&ov->mutex);
	if (!view->layer) {
		old_memcg = set_active_memcg(ov->memcg);
		lock_all_shards(ov);
		layer = layer_of(ov);
		ret = nbdcow_map_copy(view->states, layer->map, gfp);
		if (!ret) {
			kref_get(&layer->kref);
			/* Pairs with the acquire in view_needs(). */
			smp_store_release(&view->layer, layer);
		}
		unlock_all_shards(ov);
		set_active_memcg(old_memcg);
	}
	mutex_unlock(&ov->mutex);
	return ret;
}

/* The page that holds the block as it was, locked. */
static struct page *get_viewed(struct nbdcow_view *view, u64 block)
{
	struct mem_cgroup *old_memcg = set_active_memcg(view->overlay->memcg);
	struct file *file;
	struct page *page;
	bool saved;

	for (;;) {
		saved = nbdcow_map_state(view->saved, block) == NBDCOW_OVERLAY;
		file = saved ? view->file : view->layer->file;
		page = nbdcow_store_get_locked(file, block, NBDCOW_WORK, true);
		/* With its page locked, a block that is not saved cannot change. */
		if (saved || IS_ERR(page) ||
		    nbdcow_map_state(view->saved, block) != NBDCOW_OVERLAY)
			break;
		unlock_page(page);
		put_page(page);
	}
	set_active_memcg(old_memcg);
	return page;
}

static int view_read(struct nbdcow_view *view, struct nbdcow_piece *piece)
{
	struct rw_semaphore *lock = shard_lock(view->overlay, piece->block);
	struct page *page;
	int ret = 0;

	down_read(lock);
	/* Blocks are removed under the shard lock, also from a view that is lost. */
	if (READ_ONCE(view->failed)) {
		ret = -EIO;
		goto out;
	}
	page = get_viewed(view, piece->block);
	if (IS_ERR(page)) {
		ret = PTR_ERR(page);
		goto out;
	}
	/* They are rewritten under the page lock. */
	if (READ_ONCE(view->failed))
		ret = -EIO;
	else
		nbdcow_copy_from_page(piece, page);
	unlock_page(page);
	put_page(page);
out:
	up_read(lock);
	return ret;
}

/**
 * nbdcow_view_read() - read bytes of a block that was stored
 * @view: the view, frozen
 * @piece: which bytes; its iterator is advanced on success
 *
 * Context: process context, not in map(); sleeps.
 * Return: 0; -EIO if the view is lost; -EIO or -ENOMEM from swapping in.
 */
int nbdcow_view_read(struct nbdcow_view *view, struct nbdcow_piece *piece)
{
	unsigned long start = jiffies;
	int ret;

	do {
		ret = view_read(view, piece);
	} while (wait_for_memory(ret, start));
	return ret;
}

/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A view would show what the device did not hold at one instant, or change: what
 * kernel/overlay.c does with one block for a view, for spin to try every interleaving
 * of. Names are those of the kernel code. tests/user/model.sh runs it.
 *
 * The block has two halves, so that a copy can be caught half done. Clients rewrite it
 * with the page lock only or with the shard lock, discard the device's part that it is
 * in, and reset; another freezes the view and reads it. Swapping and what else can
 * happen to a page are in overlay.pml: here the page lock is all that there is to it.
 *
 * What must hold:
 *  - What the view shows first is what a read of the device might have seen during the
 *    freeze; and it shows that again each time, or fails.
 *  - It fails only if it was lost.
 *  - Nothing is used after it was freed, what is not stored has no page, and everybody
 *    comes to an end.
 *
 * As in overlay.pml each MUTANT takes one protection out, and memory is sequentially
 * consistent.
 */

/* In nbdcow_overlay_copy(), rewrite() and __zero_leaf() */
#define NO_LOOK_FAST	 1	/* is_viewed() */
#define LOOK_BEFORE_LOCK 2	/* only its order */
#define NO_SAVE_REWRITE	 3	/* save_for_views() */
#define NO_SAVE_DISCARD	 4	/* save_range() */
/* In save_for_views() and save_block() */
#define NO_INSTALLER	 5	/* mutex_lock(lock), and the look under it */
#define NO_FROM_LOCK	 6	/* the lock of the block's page */
#define SAVED_EARLY	 7	/* nbdcow_map_change() comes after the copy */
/* In nbdcow_view_freeze() */
#define NO_FREEZE_LOCK	 8	/* lock_all_shards() */
#define NO_LAYER_REF	 9	/* kref_get() of the layer */
/* In view_read() and get_viewed() */
#define NO_SECOND_LOOK	 10	/* saved, with the page locked */
#define NO_PAGE_LOCK	 11	/* nbdcow_store_get_locked() */
#define NO_SHARD_LOCK	 12	/* down_read(lock) */
#define NO_FIRST_FAILED	 13	/* failed, before the page is there */
#define NO_LAST_FAILED	 14	/* failed, with the page locked */

#ifndef MUTANT
#define MUTANT	0
#endif
#ifndef CLIENTS
#define CLIENTS	2
#endif
/* May there be no room to save a block? */
#ifndef FAIL
#define FAIL	1
#endif

#define BIT(n)	(1 << (n))
#define OPS	(1 + CLIENTS)	/* the first is what was there */

/* Kinds of operations */
#define WRITE	0
#define DISCARD	1
#define RESET	2

#ifndef LAST_KIND
#define LAST_KIND RESET		/* none that follows */
#endif

/* Content of half a block; a write stores WRITTEN + its number. */
#define FREED	0
#define BASE_BYTES 1
#define ZERO_BYTES 2
#define WRITTEN	3
#define CONTENT(op) \
	(kind[op] == DISCARD -> ZERO_BYTES : (kind[op] == RESET -> BASE_BYTES : WRITTEN + op))

byte kind[OPS];
byte begun, ended, dead;	/* bit per operation; dead: overwritten for certain */
byte before[OPS];		/* what had ended when it began */

#define BASE	0
#define OVERLAY	1
#define ZERO	2

typedef Layer {
	byte state;
	bit page;		/* it has one */
	byte bytes[2];		/* of it */
	bit locked;
	byte refs;		/* the overlay's and the view's */
	byte readers;		/* bit per client, under RCU */
	bit freed;
};
Layer layers[1 + CLIENTS];
byte nr_layers = 1;
byte layer;

byte shard_readers;
bit shard_writer, installer, mutex;

/* The view */
byte view_layer;		/* 0, or 1 + layer */
byte view_state;
bit saved, failed;
byte kept[2];			/* its file */
byte allowed;			/* operations whose content it may show */
byte running;

inline op_begin(op)
{
	before[op] = ended;
	begun = begun | BIT(op)
}

inline op_end(op)
{
	ended = ended | BIT(op);
	dead = dead | before[op]
}

#define USES(lay)	assert(!layers[lay].freed)
#define VIEW_NEEDS(lay)	\
	(view_layer == 1 + lay && !failed && view_state == OVERLAY && !saved)

/* Frees the layer if it was the last reference, and nobody is in it. */
inline layer_put(lay)
{
	d_step { layers[lay].refs--; last = (layers[lay].refs == 0) }
	if
	:: last ->
		d_step {
			layers[lay].readers == 0 ->
			layers[lay].freed = 1;
			layers[lay].bytes[0] = FREED;
			layers[lay].bytes[1] = FREED
		}
	:: else
	fi
}

inline copy_to_page(lay, op)
{
	d_step { USES(lay); layers[lay].bytes[0] = WRITTEN + op }
	layers[lay].bytes[1] = WRITTEN + op
}

/* save_for_views(); the caller has the shard lock. */
inline save_for_views(lay)
{
	if
	:: VIEW_NEEDS(lay) ->
#if MUTANT != NO_INSTALLER
		atomic { !installer -> installer = 1 }
		if
		:: !VIEW_NEEDS(lay) -> goto kept_now
		:: else
		fi;
#endif
#if FAIL
		if
		:: failed = 1; goto kept_now
		:: true
		fi;
#endif
		/* save_block() */
#if MUTANT != NO_FROM_LOCK
		atomic { !layers[lay].locked -> layers[lay].locked = 1 }
#endif
#if MUTANT == SAVED_EARLY
		saved = 1;
#endif
		d_step { USES(lay); kept[0] = layers[lay].bytes[0] }
		d_step {
			kept[1] = layers[lay].bytes[1];
			saved = 1
		}
#if MUTANT != NO_FROM_LOCK
		layers[lay].locked = 0;
#endif
kept_now:
#if MUTANT != NO_INSTALLER
		installer = 0
#else
		skip
#endif
	:: else
	fi
}

proctype client(byte op)
{
	byte lay;
	bit last, viewed;

	if
	:: kind[op] == WRITE -> goto write
	:: kind[op] == DISCARD -> goto discard
	:: kind[op] == RESET -> goto reset
	fi;

write:	/* nbdcow_overlay_copy() */
	atomic {
		op_begin(op);
		lay = layer;
		layers[lay].readers = layers[lay].readers | BIT(op)
	}
#if MUTANT == LOOK_BEFORE_LOCK
	viewed = VIEW_NEEDS(lay);
#endif
	if
	:: atomic {
		/* nbdcow_store_lock() only tries */
		layers[lay].state == OVERLAY && !layers[lay].locked ->
		USES(lay);
		layers[lay].locked = 1
	   }
	:: goto slowly
	fi;
	if
#if MUTANT == NO_LOOK_FAST
	:: layers[lay].state == OVERLAY ->
#elif MUTANT == LOOK_BEFORE_LOCK
	:: layers[lay].state == OVERLAY && !viewed ->
#else
	:: layers[lay].state == OVERLAY && !VIEW_NEEDS(lay) ->
#endif
		copy_to_page(lay, op);
		atomic {
			layers[lay].locked = 0;
			layers[lay].readers = layers[lay].readers & ~BIT(op)
		}
		goto out
	:: else -> layers[lay].locked = 0
	fi;
slowly:
	atomic { layers[lay].readers = layers[lay].readers & ~BIT(op) }
	/* __overlay_write() */
	atomic {
		!shard_writer ->
		shard_readers++;
		lay = layer
	}
	if
	:: layers[lay].state == OVERLAY
	:: else ->
		/* install_block() */
		atomic { !installer -> installer = 1 }
		if
		:: layers[lay].state != OVERLAY ->
			layers[lay].page = 1;
			copy_to_page(lay, op);
			layers[lay].state = OVERLAY;
			installer = 0;
			goto written
		:: else -> installer = 0
		fi
	fi;
	/* rewrite() */
#if MUTANT != NO_SAVE_REWRITE
	save_for_views(lay);
#endif
	atomic { !layers[lay].locked -> layers[lay].locked = 1 }
	copy_to_page(lay, op);
	layers[lay].locked = 0;
written:
	shard_readers--;
	goto out;

discard: /* nbdcow_overlay_zero() */
	atomic { op_begin(op); !shard_writer && shard_readers == 0 -> shard_writer = 1; lay = layer }
	if
	:: layers[lay].state == OVERLAY ->
#if MUTANT != NO_SAVE_DISCARD
		save_for_views(lay);
#endif
		layers[lay].state = ZERO;
		d_step {
			/* nbdcow_store_punch() */
			!layers[lay].locked ->
			USES(lay);
			layers[lay].page = 0;
			layers[lay].bytes[0] = FREED;
			layers[lay].bytes[1] = FREED
		}
	:: else -> layers[lay].state = ZERO
	fi;
	shard_writer = 0;
	goto out;

reset:	/* nbdcow_overlay_reset(), layer_work() */
	atomic { op_begin(op); !mutex -> mutex = 1 }
	atomic {
		!shard_writer && shard_readers == 0 ->
		lay = layer;
		layers[nr_layers].refs = 1;
		layer = nr_layers;
		nr_layers++;
		mutex = 0
	}
	layer_put(lay);
out:
	atomic { op_end(op); running-- }
}

/* view_read(): in `got', or `lost' */
inline view_read()
{
	if
	:: view_state != OVERLAY ->
		got[0] = (view_state == ZERO -> ZERO_BYTES : BASE_BYTES);
		got[1] = got[0]
	:: else ->
#if MUTANT != NO_SHARD_LOCK
		atomic { !shard_writer -> shard_readers++ }
#endif
#if MUTANT != NO_FIRST_FAILED
		lost = failed;
#endif
		do
		:: lost -> break
		:: !lost && saved ->
			d_step { got[0] = kept[0]; got[1] = kept[1]; lost = failed }
			break
		:: !lost && !saved ->
#if MUTANT != NO_PAGE_LOCK
			atomic { !layers[view_layer - 1].locked -> layers[view_layer - 1].locked = 1 }
#endif
			/* it would bring one into being */
			assert(layers[view_layer - 1].page);
#if MUTANT != NO_SECOND_LOOK
			if
			:: saved ->
#if MUTANT != NO_PAGE_LOCK
				layers[view_layer - 1].locked = 0;
#endif
				goto again
			:: else
			fi;
#endif
#if MUTANT != NO_LAST_FAILED
			lost = failed;
#endif
			if
			:: !lost ->
				d_step { USES(view_layer - 1); got[0] = layers[view_layer - 1].bytes[0] }
				got[1] = layers[view_layer - 1].bytes[1]
			:: else
			fi;
#if MUTANT != NO_PAGE_LOCK
			layers[view_layer - 1].locked = 0;
#endif
			break;
again:
			skip
		od;
#if MUTANT != NO_SHARD_LOCK
		shard_readers--
#endif
	fi
}

proctype viewer()
{
	byte got[2], first, gone, lay, op, n;
	bit lost;

	/* nbdcow_view_freeze() */
	atomic { gone = dead; !mutex -> mutex = 1 }
#if MUTANT != NO_FREEZE_LOCK
	atomic { !shard_writer && shard_readers == 0 -> shard_writer = 1 }
#endif
	lay = layer;
	d_step { USES(lay); view_state = layers[lay].state }
	d_step {
#if MUTANT != NO_LAYER_REF
		layers[lay].refs++;
#endif
		view_layer = 1 + lay;
	}
#if MUTANT != NO_FREEZE_LOCK
	shard_writer = 0;
#endif
	mutex = 0;
	allowed = begun & ~gone;
	do
	:: n < 2 ->
		got[0] = 0;
		got[1] = 0;
		view_read();
		atomic {
			assert(!lost || failed);
			if
			:: !lost && !first ->
				op = 0;
				do
				:: op < OPS && !((allowed & BIT(op)) && CONTENT(op) == got[0]) -> op++
				:: else -> break
				od;
				assert(op < OPS);
				op = 0;
				first = got[0]
			:: else
			fi;
			assert(lost || (got[0] == first && got[1] == first));
			n++
		}
	:: else -> break
	od;
	running--
}

init
{
	byte op = 1;

	atomic {
		begun = 1;
		ended = 1;
		layers[0].refs = 1;
		if
		:: kind[0] = RESET
		:: kind[0] = DISCARD; layers[0].state = ZERO
		:: kind[0] = WRITE;
			layers[0].state = OVERLAY;
			layers[0].page = 1;
			layers[0].bytes[0] = WRITTEN;
			layers[0].bytes[1] = WRITTEN
		fi;
		running = 1 + CLIENTS;
		do
		:: op < OPS ->
			/* clients are alike: in one order only */
			kind[op] = (op > 1 -> kind[op - 1] : WRITE);
			do
			:: kind[op] < LAST_KIND -> kind[op]++
			:: break
			od;
			run client(op);
			op++
		:: else -> break
		od;
		run viewer()
	}
	atomic {
		running == 0 ->
		assert(!shard_readers && !shard_writer && !installer && !mutex);
		assert(!layers[layer].locked)
	}
}

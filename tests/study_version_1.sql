BEGIN TRANSACTION;
CREATE TABLE assignment (rater INTEGER NOT NULL REFERENCES rater, place INTEGER NOT NULL CHECK (place > 0), item INTEGER NOT NULL REFERENCES item,
  shown TEXT NOT NULL, PRIMARY KEY (rater, item), UNIQUE (rater, place)) STRICT, WITHOUT ROWID;
INSERT INTO "assignment" VALUES(1,2,1,'1');
INSERT INTO "assignment" VALUES(1,3,2,'1');
INSERT INTO "assignment" VALUES(1,1,3,'1');
INSERT INTO "assignment" VALUES(2,2,1,'1');
INSERT INTO "assignment" VALUES(2,1,2,'1');
INSERT INTO "assignment" VALUES(2,3,3,'1');
CREATE TABLE click (rater INTEGER NOT NULL, item INTEGER NOT NULL, turn INTEGER NOT NULL CHECK (turn > 0), said TEXT NOT NULL,
  PRIMARY KEY (rater, item, turn), FOREIGN KEY (rater, item) REFERENCES assignment) STRICT, WITHOUT ROWID;
INSERT INTO "click" VALUES(1,1,1,'2026-11-26T05:34:28.966+00:00');
INSERT INTO "click" VALUES(1,3,1,'2026-11-26T05:34:28.964+00:00');
INSERT INTO "click" VALUES(1,3,2,'2026-11-26T05:34:28.970+00:00');
CREATE TABLE entry (item INTEGER NOT NULL REFERENCES item, entry INTEGER NOT NULL CHECK (entry BETWEEN 1 AND 9), system TEXT REFERENCES system,
  picture TEXT NOT NULL CHECK (length(picture) = 64 AND picture NOT GLOB '*[^0-9a-f]*'), low INTEGER, high INTEGER,
  PRIMARY KEY (item, entry)) STRICT, WITHOUT ROWID;
INSERT INTO "entry" VALUES(1,1,'old','44f88e95a9522b79ce9d94e6cb0e85f683d2e5bbe8e85b6ac01a9a002e6ea629',NULL,NULL);
INSERT INTO "entry" VALUES(2,1,'old','1294f94354904991c65d63b3066ca015dcf668bf111a63e387f5a1779b46e00f',NULL,NULL);
INSERT INTO "entry" VALUES(3,1,NULL,'2baaf86d5ab14eb71d10375b33a685828dff885e3894137527ad71eb3fc31a08',1,1);
CREATE TABLE item (item INTEGER PRIMARY KEY, source TEXT NOT NULL, text TEXT NOT NULL, is_check INTEGER NOT NULL CHECK (is_check IN (0, 1))) STRICT;
INSERT INTO "item" VALUES(1,'0','a bird that''s "0"',0);
INSERT INTO "item" VALUES(2,'1','a bird that''s "1"',0);
INSERT INTO "item" VALUES(3,'check 0','A check of attention: choose the number of dots in the picture.',1);
CREATE TABLE mark (rater INTEGER NOT NULL, item INTEGER NOT NULL, turn INTEGER NOT NULL, entry INTEGER NOT NULL,
  value INTEGER NOT NULL CHECK (value > 0), PRIMARY KEY (rater, item, turn, entry), UNIQUE (rater, item, turn, value),
  FOREIGN KEY (rater, item, turn) REFERENCES click ON DELETE CASCADE, FOREIGN KEY (item, entry) REFERENCES entry) STRICT, WITHOUT ROWID;
INSERT INTO "mark" VALUES(1,1,1,1,4);
INSERT INTO "mark" VALUES(1,3,1,1,2);
INSERT INTO "mark" VALUES(1,3,2,1,3);
CREATE TABLE rater (rater INTEGER PRIMARY KEY, token BLOB UNIQUE CHECK (length(token) = 32), consented TEXT, withdrawn TEXT,
  CHECK (withdrawn IS NULL OR consented IS NOT NULL)) STRICT;
INSERT INTO "rater" VALUES(1,X'60694F7CFD7FB53F942D0EE0C68534DCF33E5D27B46F6A25357853C0B0B2BDAF','2026-11-26T05:34:28.959+00:00',NULL);
INSERT INTO "rater" VALUES(2,X'CF51818EDF61CA221D88EFCC5A0AAFB596FBC477D0F929963CB34B8BB3F41FB0',NULL,NULL);
CREATE TABLE study (one INTEGER PRIMARY KEY CHECK (one = 1), kind TEXT NOT NULL CHECK (kind IN ('scores', 'quality', 'correlation')),
  question TEXT NOT NULL, scale TEXT NOT NULL, top INTEGER NOT NULL CHECK (top BETWEEN 2 AND 9), each INTEGER NOT NULL CHECK (each > 0),
  attention REAL NOT NULL CHECK (attention BETWEEN 0 AND 1), consent TEXT NOT NULL, seed INTEGER NOT NULL, made TEXT NOT NULL) STRICT;
INSERT INTO "study" VALUES(1,'scores','How well do the picture and the sentence fit each other?','["unrelated", "somewhat matching", "match in part, minor errors", "match completely, no errors"]',4,2,0.75,'Do you agree?',5,'2026-11-26T05:34:28.838+00:00');
CREATE TABLE system (name TEXT PRIMARY KEY NOT NULL, origin TEXT NOT NULL) STRICT;
INSERT INTO "system" VALUES('old','{}');
CREATE TRIGGER study_stays BEFORE UPDATE ON study BEGIN SELECT RAISE(ABORT, 'what was asked and said is never changed'); END;
CREATE TRIGGER system_stays BEFORE UPDATE ON system BEGIN SELECT RAISE(ABORT, 'what was asked and said is never changed'); END;
CREATE TRIGGER item_stays BEFORE UPDATE ON item BEGIN SELECT RAISE(ABORT, 'what was asked and said is never changed'); END;
CREATE TRIGGER entry_stays BEFORE UPDATE ON entry BEGIN SELECT RAISE(ABORT, 'what was asked and said is never changed'); END;
CREATE TRIGGER assignment_stays BEFORE UPDATE ON assignment BEGIN SELECT RAISE(ABORT, 'what was asked and said is never changed'); END;
CREATE TRIGGER click_stays BEFORE UPDATE ON click BEGIN SELECT RAISE(ABORT, 'what was asked and said is never changed'); END;
CREATE TRIGGER mark_stays BEFORE UPDATE ON mark BEGIN SELECT RAISE(ABORT, 'what was asked and said is never changed'); END;
CREATE TRIGGER study_kept BEFORE DELETE ON study BEGIN SELECT RAISE(ABORT, 'what was asked is never deleted'); END;
CREATE TRIGGER system_kept BEFORE DELETE ON system BEGIN SELECT RAISE(ABORT, 'what was asked is never deleted'); END;
CREATE TRIGGER item_kept BEFORE DELETE ON item BEGIN SELECT RAISE(ABORT, 'what was asked is never deleted'); END;
CREATE TRIGGER entry_kept BEFORE DELETE ON entry BEGIN SELECT RAISE(ABORT, 'what was asked is never deleted'); END;
CREATE TRIGGER rater_kept BEFORE DELETE ON rater BEGIN SELECT RAISE(ABORT, 'what was asked is never deleted'); END;
CREATE TRIGGER assignment_kept BEFORE DELETE ON assignment BEGIN SELECT RAISE(ABORT, 'what was asked is never deleted'); END;
CREATE TRIGGER click_kept BEFORE DELETE ON click WHEN (SELECT withdrawn FROM rater WHERE rater = OLD.rater) IS NULL
  BEGIN SELECT RAISE(ABORT, 'only a rater who withdraws takes answers back'); END;
CREATE TRIGGER mark_kept BEFORE DELETE ON mark WHEN (SELECT withdrawn FROM rater WHERE rater = OLD.rater) IS NULL
  BEGIN SELECT RAISE(ABORT, 'only a rater who withdraws takes answers back'); END;
CREATE TRIGGER click_allowed BEFORE INSERT ON click WHEN NOT EXISTS
  (SELECT 1 FROM rater WHERE rater = NEW.rater AND consented IS NOT NULL AND withdrawn IS NULL)
  BEGIN SELECT RAISE(ABORT, 'this rater has not agreed to take part'); END;
CREATE TRIGGER click_next BEFORE INSERT ON click
  WHEN NEW.turn <> 1 + (SELECT COALESCE(MAX(turn), 0) FROM click WHERE rater = NEW.rater AND item = NEW.item)
  BEGIN SELECT RAISE(ABORT, 'turns have no gaps'); END;
CREATE TRIGGER mark_fits BEFORE INSERT ON mark WHEN NEW.value > (SELECT top FROM study)
  BEGIN SELECT RAISE(ABORT, 'this mark is not on the scale'); END;
CREATE TRIGGER mark_now BEFORE INSERT ON mark WHEN NEW.turn < (SELECT MAX(turn) FROM click WHERE rater = NEW.rater AND item = NEW.item)
  BEGIN SELECT RAISE(ABORT, 'an earlier turn is never changed'); END;
CREATE VIEW answer AS SELECT mark.rater, mark.item, mark.turn, mark.entry, mark.value FROM mark
  JOIN (SELECT rater, item, MAX(turn) AS turn FROM click GROUP BY rater, item) USING (rater, item, turn);
COMMIT;
PRAGMA application_id = 2020438900;
PRAGMA user_version = 1;

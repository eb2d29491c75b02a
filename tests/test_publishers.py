"""Publishers' own tables: tiny files of the official layouts become filelists."""

import gzip
import zipfile
from typing import get_args

import numpy as np
import pytest
from conftest import Listener
from PIL import Image

from lcmem_cli.cli.manifest import Publisher
from lcmem_cli.engine.data.filelist import make_publisher_filelist
from lcmem_cli.engine.data.images import load_image
from lcmem_cli.engine.data.manifest import load_manifest
from lcmem_cli.engine.data.publishers import LAYOUTS
from lcmem_cli.engine.data.tables import ListColumns
from lcmem_cli.engine.errors import InputError, ManifestError

NIH = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
    "00000001_000.png,Cardiomegaly,0,1,58,M,PA,2682,2749,0.143,0.143,\n"
    "00000001_001.png,Cardiomegaly|Emphysema,1,1,58,M,PA,2894,2729,0.143,0.143,\n"
    "00000002_000.png,No Finding,0,2,81,M,PA,2500,2048,0.171,0.171,\n"
    "00000003_000.png,Hernia,0,3,81,F,PA,2582,2991,0.143,0.143,\n"
)
CXR_LT = "dicom_id,subject_id,study_id,ViewPosition,ViewCodeSequence_CodeMeaning,fpath,Mass\n"
LESIONS = "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset\n"
CASES = {
    "nih-cxr14": (
        {
            "Data_Entry_2017.csv": NIH,
            "train_val_list.txt": "00000001_000.png\n00000001_001.png\n00000003_000.png\n",
            "test_list.txt": "00000002_000.png\n",
        },
        {
            "images_001/images/00000001_000.png": ("1", None),
            "images_001/images/00000001_001.png": ("1", None),
            "images_002/images/00000002_000.png": ("2", "TEST"),
            "images_002/images/00000003_000.png": ("3", None),
        },
    ),
    "celeba": (
        {
            "identity_CelebA.txt": "000001.jpg 2880\n000002.jpg 2937\n000003.jpg 2880\n",
            "list_eval_partition.txt": "000001.jpg 0\n000002.jpg 2\n000003.jpg 0\n",
        },
        {
            "img_align_celeba/000001.jpg": ("2880", None),
            "img_align_celeba/000002.jpg": ("2937", "TEST"),
            "img_align_celeba/000003.jpg": ("2880", None),
        },
    ),
    "isic": (
        {
            "ISIC_2020_Training_GroundTruth_v2.csv": (
                "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,"
                "diagnosis,benign_malignant,target\n"
                "ISIC_0000001,IP_01,IL_01,male,45.0,torso,unknown,benign,0\n"
                "ISIC_0000002,,IL_02,female,45.0,torso,unknown,benign,0\n"
            ),
            "ISIC_2020_Test_Metadata.csv": (
                "image,patient,age_approx,anatom_site_general,sex\n"
                "ISIC_0000003,IP_03,70.0,,male\n"
            ),
        },
        {
            "train/ISIC_0000001.jpg": ("IP_01", None),
            "train/ISIC_0000002.jpg": ("IL_02", None),
            "test/ISIC_0000003.jpg": ("IP_03", "TEST"),
        },
    ),
    "ham10000": (
        {
            "HAM10000_metadata.csv": LESIONS
            + "HAM_1,ISIC_0027419,bkl,histo,80.0,male,scalp,vidir\n"
            + "HAM_1,ISIC_0025030,bkl,histo,80.0,male,scalp,vidir\n"
            + "HAM_2,ISIC_0026769,nv,histo,80.0,male,ear,vidir\n",
            "ISIC2018_Task3_Test_GroundTruth.csv": LESIONS
            + "HAMTEST_1,ISIC_0034524,nv,follow_up,40.0,female,back,vidir\n",
        },
        {
            "HAM10000_images_part_1/ISIC_0027419.jpg": ("HAM_1", None),
            "HAM10000_images_part_2/ISIC_0025030.jpg": ("HAM_1", None),
            "HAM10000_images_part_2/ISIC_0026769.jpg": ("HAM_2", None),
            "ISIC2018_Task3_Test_Images/ISIC_0034524.jpg": ("HAMTEST_1", "TEST"),
        },
    ),
    "mimic-cxr-jpg": (
        {
            "mimic-cxr-2.0.0-split.csv.gz": (
                "dicom_id,study_id,subject_id,split\n"
                "02aa804e-bde0,50414267,10000032,train\n"
                "174413ec-4ec4,53189527,10000764,validate\n"
                "6a2a3e8a-1c2f,57375967,10000935,test\n"
            )
        },
        {
            "files/p10/p10000032/s50414267/02aa804e-bde0.jpg": ("10000032", "TRAIN"),
            "files/p10/p10000764/s53189527/174413ec-4ec4.jpg": ("10000764", "VAL"),
            "files/p10/p10000935/s57375967/6a2a3e8a-1c2f.jpg": ("10000935", "TEST"),
        },
    ),
    "cxr-lt": (
        {
            "train_labeled.csv": CXR_LT + "02aa804e,10000032,s5,PA,pa,files/p10/x.jpg,1\n",
            "development_labeled_task1.csv": CXR_LT + "174413ec,10000764,s6,PA,pa,files/y.jpg,0\n",
            "test_labeled_task1.csv": CXR_LT + "6a2a3e8a,10000935,s7,PA,pa,files/z.jpg,0\n",
        },
        {
            "files/p10/p10000032/s5/02aa804e.jpg": ("10000032", "TRAIN"),
            "files/p10/p10000764/s6/174413ec.jpg": ("10000764", "VAL"),
            "files/p10/p10000935/s7/6a2a3e8a.jpg": ("10000935", "TEST"),
        },
    ),
    "ct-rate": (
        {
            "train_metadata.csv": (
                "VolumeName,Manufacturer,PatientSex\ntrain_1_a_1.nii.gz,Siemens,F\n"
                "train_1_b_1.nii.gz,Siemens,F\n"
            ),
            "validation_metadata.csv": (
                "VolumeName,Manufacturer,PatientSex\nvalid_1_a_1.nii.gz,Philips,M\n"
            ),
        },
        {
            "slices/train_1_a_1_120.png": ("train_1", "TRAIN"),
            "slices/train_1_b_1_090.png": ("train_1", "TRAIN"),
            "slices/valid_1_a_1_100.png": ("valid_1", "VAL"),
        },
    ),
    "imagenet": (
        {
            "train_cls.txt": "n01440764/n01440764_10026 1\nn01440764/n01440764_10027 2\n",
            "val.txt": "ILSVRC2012_val_00000001 1\n",
        },
        {
            "train/n01440764/n01440764_10026.JPEG": ("n01440764_10026", "TRAIN"),
            "train/n01440764/n01440764_10027.JPEG": ("n01440764_10027", "TRAIN"),
            "val/ILSVRC2012_val_00000001.JPEG": ("ILSVRC2012_val_00000001", "VAL"),
        },
    ),
}  # fmt: skip


def lay_out(folder, name):
    tables, images = CASES[name]
    for table, text in tables.items():
        content = text.encode()
        (folder / table).write_bytes(gzip.compress(content) if table.endswith("gz") else content)
    for path in images:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / path)
    return [folder / table for table in tables], images


def test_the_command_knows_the_layouts_there_are():
    assert set(get_args(Publisher)) == {*LAYOUTS, "cifar10"} == {*CASES, "cifar10"}


@pytest.mark.parametrize("name", CASES)
def test_identities_and_official_splits_are_read(tmp_path, name):
    tables, expected = lay_out(tmp_path, name)
    for order in (tables, tables[::-1]):
        result = make_publisher_filelist(name, order, tmp_path / "list.csv", basedir=tmp_path)
        listed = load_manifest(tmp_path / "list.csv")
        found = {r.path: (r.id, r.split) for r in listed.records}
        assert result.kept_split and listed.ds_names == (name,)
        for path, (identity, split) in expected.items():
            assert found.pop(path) in {(identity, s) for s in ([split] if split else SPLIT_OPEN)}
        assert not found


SPLIT_OPEN = ("TRAIN", "VAL")
"""Where the publisher has no VAL, TRAIN's identities are divided."""


def test_a_table_without_a_split_gets_one_by_identity(tmp_path):
    tables, _ = lay_out(tmp_path, "nih-cxr14")
    result = make_publisher_filelist("nih-cxr14", tables[:1], tmp_path / "list.csv")
    assert not result.kept_split
    assert load_manifest(tmp_path / "list.csv").records[0].id == "1"


def test_a_split_that_divides_a_patient_is_replaced(tmp_path):
    tables, _ = lay_out(tmp_path, "nih-cxr14")
    tables[2].write_text("00000002_000.png\n00000001_001.png\n")
    tables[1].write_text("00000001_000.png\n00000003_000.png\n")
    told = Listener()
    result = make_publisher_filelist("nih-cxr14", tables, tmp_path / "list.csv", reporter=told)
    assert not result.kept_split and "in more than one split" in " ".join(told.warnings)
    load_manifest(tmp_path / "list.csv")


def test_what_is_not_there_and_what_is_in_no_table_is_counted(tmp_path):
    tables, _ = lay_out(tmp_path, "celeba")
    (tmp_path / "img_align_celeba/000003.jpg").unlink()
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    told = Listener()
    make_publisher_filelist("celeba", tables, tmp_path / "list.csv", reporter=told)
    said = " ".join(told.warnings)
    assert "left out 1 image(s) of no table: other.png" in said
    assert "1 of 3 images of the tables are not there" in said
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ManifestError, match="none of its images is in the tables"):
        make_publisher_filelist("celeba", tables, tmp_path / "l.csv", basedir=empty)


@pytest.mark.parametrize(
    ("name", "table", "text", "message"),
    [
        ("celeba", "identity_CelebA.txt", "000001.jpg 1\n000001.jpg 2\n", "says '2' of '000001'"),
        ("celeba", "list_eval_partition.txt", "000001.jpg 7\n", "no split '7'"),
        ("celeba", "list_eval_partition.txt", "000001.jpg 0\n", "no identities"),
        ("isic", "metadata.csv", "isic_id,sex\nISIC_1,male\n", "no identities"),
        ("ham10000", "labels.csv", "path,id\na,1\n", "no column 'image_id' or 'image'"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path, name, table, text, message):
    (tmp_path / table).write_text(text)
    with pytest.raises(ManifestError, match=message):
        make_publisher_filelist(name, [tmp_path / table], tmp_path / "list.csv")


def test_an_unknown_publisher_names_the_nearest(tmp_path):
    with pytest.raises(InputError, match="did you mean 'celeba'"):
        make_publisher_filelist("celebs", [], tmp_path / "list.csv")


def test_from_the_command_line(run_cli, tmp_path):
    tables, _ = lay_out(tmp_path, "mimic-cxr-jpg")
    shown = run_cli("manifest", "--from", "mimic-cxr-jpg", *tables, "-o", tmp_path / "list.csv")
    assert "split already" in shown.stdout
    refused = run_cli(
        "manifest", "--from", "mimic-cxr-jpg", *tables, "--id-regex", "x",
        "-o", tmp_path / "list.csv", exit_code=2,
    )  # fmt: skip
    assert "--id-regex has no effect with --from" in refused.stderr
    two = run_cli("manifest", tmp_path, tmp_path, "-o", tmp_path / "list.csv", exit_code=2)
    assert "one folder or filelist" in two.stderr


def test_batches_of_cifar10_are_listed_and_read(run_cli, tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (6, 1 + 3 * 32 * 32), np.uint8)
    batches = [
        tmp_path / name for name in ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin")
    ]
    for number, batch in enumerate(batches):
        rows[2 * number : 2 * number + 2].tofile(batch)
    out = tmp_path / "list.csv"
    run_cli("manifest", "--from", "cifar10", *batches, "-o", out)
    listed = load_manifest(out)
    assert [record.path for record in listed.records[-2:]] == [
        "test_batch.bin::000000", "test_batch.bin::000001",
    ]  # fmt: skip
    assert [record.split for record in listed.records[-2:]] == ["TEST", "TEST"]
    pixels = np.asarray(load_image(listed.paths()[3]))
    assert (pixels == rows[3, 1:].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    labels = load_manifest(batches[0], columns=ListColumns(id="label"), need_split=False)
    assert [record.id for record in labels.records] == [str(row[0]) for row in rows[:2]]
    (tmp_path / "data_batch_1").write_bytes(b"pickled")
    refused = run_cli("manifest", "--from", "cifar10", tmp_path / "data_batch_1", "-o", out,
                      exit_code=2)  # fmt: skip
    assert "is pickled, which could run code" in " ".join(refused.stderr.split())
    batches[0].write_bytes(b"short")
    with pytest.raises(ManifestError, match="no multiple of 3,073"):
        load_manifest(batches[0])


def test_images_of_a_published_set_may_lie_in_an_archive(tmp_path):
    tables, images = lay_out(tmp_path, "celeba")
    with zipfile.ZipFile(tmp_path / "img_align_celeba.zip", "w") as packed:
        for path in images:
            packed.write(tmp_path / path, path)
    packed = tmp_path / "img_align_celeba.zip"
    make_publisher_filelist("celeba", tables, tmp_path / "list.csv", basedir=packed)
    found = load_manifest(tmp_path / "list.csv").records[1]
    assert found.path == "img_align_celeba.zip::img_align_celeba/000002.jpg"
    assert (found.id, found.split) == ("2937", "TEST")
